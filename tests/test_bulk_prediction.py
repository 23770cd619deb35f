"""Many files are divided into parts once, mistakes are told before anything is computed, and what is there can be read as one."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import alone_on_the_cpu
from support import reviews, write_csv
from tiny_model import write_model

from accel_trainer import bulk_folder, bulk_prediction, claims, predict, predictor
from accel_trainer.bulk_files import find_inputs, output_name
from accel_trainer.bulk_folder import MANIFEST
from accel_trainer.bulk_prediction import Options, _in_turn, prepare, work
from accel_trainer.claims import Claims
from accel_trainer.errors import Interrupted, RunFolderError, UserError
from accel_trainer.predict import load_predictor, predict_file
from accel_trainer.signals import interrupted_by_signals
from accel_trainer.tracking import speak_on
from accel_trainer.writing import created


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    with alone_on_the_cpu(tmp_path / "cache"):
        yield


def rows_of(first: int, last: int) -> list[dict[str, Any]]:
    return [{"id": i, "text": text} for i, (text, _) in enumerate(reviews(last))][first:]


def write(path: Path, rows: list[dict[str, Any]], group: int | None = None) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    elif path.suffix == ".csv":
        write_csv(path, [list(row.values()) for row in rows], list(rows[0]))
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def label(model: Path, *patterns: str, output: str = "out", **options: Any) -> None:
    work(prepare(str(model), Options(list(patterns) or ["in/*"], Path(output), **options)))


def run(model: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The command line: its exit code and what it said to stderr."""
    code = predict.main([str(model), *arguments])
    return code, capsys.readouterr().err


def files(folder: str = "out") -> list[str]:
    return sorted(str(path) for path in Path(folder).glob("*/part-*"))


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_folder_is_read_as_one_table_in_order_by_all(model: Path) -> None:
    """Names that sort otherwise as folders than as files, and that readers would hide or take for columns."""
    names = ["x-1.parquet", "x.1.jsonl.gz", "x.parquet", "_l=en.parquet"]
    order = sorted(names, key=lambda name: f"{output_name(Path(name))}/")
    assert [output_name(Path(name)) for name in order] == ["l-en", "x-1", "x.1", "x"]
    for i, name in enumerate(order):
        write(Path("in") / name, rows_of(20 * i, 20 * i + 20))
    assert list(find_inputs(["in/*"], Path("out"))) == ["l-en", "x-1", "x.1", "x"]
    label(model, rows_per_file=7)
    found = pd.read_parquet("out")
    assert found["id"].tolist() == list(range(80))
    assert list(found.columns) == ["id", "text", "prediction", "probabilities"]
    assert found["text"].tolist() == [row["text"] for row in rows_of(0, 80)]
    assert datasets.load_dataset("out", split="train")["id"][:] == list(range(80))
    by_pattern = datasets.load_dataset("parquet", data_files="out/*/*.parquet", split="train")
    assert by_pattern["id"][:] == list(range(80))


@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_the_rows_are_those_of_the_file_form(model: Path, kind: str, format: str) -> None:
    rows = rows_of(0, 43)
    rows[3]["text"], rows[30]["text"] = '=good, "very"\nsoup 面', ""
    source = write(Path("in") / f"a.{kind}", rows, group=9)
    predict_file(load_predictor(str(model)), source, Path(f"one.{format}"), None)
    label(model, format=format, rows_per_file=10)
    assert len(files()) == 5
    if format == "parquet":
        one, many = pq.read_table("one.parquet"), pa.concat_tables(map(pq.read_table, files()))
        assert one.schema == many.schema
        records = [table.to_pylist() for table in (one, many)]
    elif format == "jsonl":
        texts = Path("one.jsonl").read_text(encoding="utf-8"), "".join(Path(p).read_text("utf-8") for p in files())
        records = [[json.loads(line) for line in text.splitlines()] for text in texts]
    else:
        frames = pd.read_csv("one.csv", dtype=str), pd.concat([pd.read_csv(path, dtype=str) for path in files()])
        assert "'=good" in frames[0]["text"][3]
        records = [frame.fillna("").to_dict("records") for frame in frames]
    one, many = records
    assert len(one) == 43
    for ours, theirs in zip(many, one, strict=True):
        shares = [flat_shares(record) for record in (ours, theirs)]
        assert ours == theirs
        assert shares[0] == pytest.approx(shares[1], abs=1e-6)
    assert len({record["prediction"] for record in one}) == 2


def flat_shares(record: dict[str, Any]) -> list[float]:
    """The probabilities of a record, taken out of it."""
    named = record.pop("probabilities", None)
    return list(named.values()) if named else [float(record.pop(f"probability_{name}")) for name in ("bad", "good")]


def test_columns_come_as_they_were(model: Path) -> None:
    """Kinds of cells that no Python object holds; an all-null column beside one of numbers; columns in another order."""
    table = pa.table({
        "text": pa.array(["good soup", "bad"]).dictionary_encode(),
        "at": pa.array([1, 2**60 + 1], pa.timestamp("ns")),
        "n": pa.array([7, 2**53 + 1], pa.int64()),
        "list": pa.array([[1.5], None], pa.list_(pa.float32())),
        "nothing": pa.array([None, None], pa.null()),
        "prediction": ["old", "old"],
    })  # fmt: skip
    pq.write_table(table, "in/a.parquet")
    other = table.set_column(4, "nothing", pa.array([1, 2], pa.int16())).select(
        ["n", "nothing", "at", "list", "text", "prediction"]
    )
    pq.write_table(other, "in/b.parquet")
    label(model)
    one, two = map(pq.read_table, files())
    assert one.column_names == ["text", "at", "n", "list", "nothing", "prediction", "probabilities"]
    assert one.schema == two.schema
    assert one.schema.field("nothing").type == pa.int16()
    for name in ("at", "n", "list"):
        assert one.column(name).equals(table.column(name))
        assert two.column(name).equals(table.column(name))
    assert set(one.column("prediction").to_pylist()) <= {"good", "bad"}


def test_pairs(model: Path) -> None:
    rows = [{"a": text, "b": other} for (text, _), (other, _) in zip(reviews(9), reviews(9, seed=3), strict=True)]
    write(Path("in/a.parquet"), rows)
    label(model, text_column="a", text_pair_column="b")
    predict_file(load_predictor(str(model)), Path("in/a.parquet"), Path("one.parquet"), "a", "b")
    assert pq.read_table(files()[0]).to_pylist() == pq.read_table("one.parquet").to_pylist()


def test_the_precision_of_the_launch(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(Path("in/a.parquet"), rows_of(0, 30))
    label(model)
    with alone_on_the_cpu(Path("cache").absolute()):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        label(model, output="half")
        with pytest.raises(
            RunFolderError, match="mixed_precision of the accelerate config is bf16, and was no when the folder was"
        ):
            label(model)
    whole, half = (np.asarray([list(r.values()) for r in pq.read_table(f)["probabilities"].to_pylist()])
                   for f in (*files(), *files("half")))  # fmt: skip
    assert 0 < np.abs(whole - half).max() < 0.05


# --- who does what ----------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_done_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(Path("in/a.parquet"), rows_of(0, 40))
    label(model, rows_per_file=10)
    before = {path: Path(path).stat().st_mtime_ns for path in files()}
    gone = "out/a/part-00002.parquet"
    Path(gone).unlink()
    left, alive = (Path(f"out/a/.part-0000{i}.parquet.77.writing") for i in (2, 3))
    left.write_text("half")
    alive.write_text("half")
    os.utime(left, (1, 1))  # years ago
    called = []
    label_rows = predictor.label_rows
    monkeypatch.setattr(predictor, "label_rows", lambda *a: (called.append(len(a[1])), label_rows(*a))[1])
    label(model, rows_per_file=10)
    assert called == [10]
    assert {path: Path(path).stat().st_mtime_ns for path in files() if path != gone}.items() <= before.items()
    assert pd.read_parquet("out")["id"].tolist() == list(range(40))
    assert list(Path("out").rglob("*.writing")) == [alive]


def test_each_process_begins_with_its_own(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(Path("in/a.parquet"), rows_of(0, 50))
    job = prepare(str(model), Options(["in/*"], Path("out"), rows_per_file=10))
    job = bulk_prediction.Job(**{**vars(job), "process": 1, "processes": 2})
    monkeypatch.setattr(bulk_prediction, "PAUSE", 0.0)
    tried = [part.number for part in islice(_in_turn(job, keeps_claims=True), 12)]
    assert tried == [1, 3, 0, 2, 4] * 2 + [1, 3]  # none is done
    assert {part.number for part in islice(_in_turn(job, keeps_claims=False), 12)} == {1, 3}


def test_what_another_process_is_at_work_on_is_waited_for_and_told(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A claim of each of three parts ends otherwise: its file is there, its process dies, and a signal ends the waiting."""
    write(Path("in/a.parquet"), rows_of(0, 40))
    job = prepare(str(model), Options(["in/*"], Path("out"), rows_per_file=10))
    monkeypatch.setattr(bulk_prediction.logger, "propagate", True)
    monkeypatch.setattr(bulk_prediction, "BETWEEN_LINES", 0.0)
    holders = {number: Holder(Path("out/.claims"), number) for number in (0, 1, 2)}
    looks = Counter[float]()

    def sleep(seconds: float) -> None:
        looks[seconds] += 1
        if looks[bulk_prediction.PAUSE] == 10:
            job.parts[0].target.write_text("by another")
        elif looks[bulk_prediction.PAUSE] == 20:
            holders[1].die()
        elif looks[bulk_prediction.PAUSE] == 30:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(bulk_prediction.time, "sleep", sleep)
    try:
        with pytest.raises(Interrupted), interrupted_by_signals(resumable=False):
            work(job)
    finally:
        for holder in holders.values():
            holder.die()
    assert [part.is_done for part in job.parts] == [True, True, False, True]
    assert job.parts[0].target.read_text() == "by another"
    assert "1 of 4 files" in caplog.text
    assert "another process is at work on out/a/part-00002.parquet" in caplog.text


class Holder:
    """Another process, which has a claim until it dies."""

    def __init__(self, path: Path, piece: int) -> None:
        told, tell = os.pipe()
        self._process = os.fork()
        if not self._process:
            try:
                with Claims(path).claimed(piece):
                    os.write(tell, b"held")
                    signal.pause()
            finally:
                os._exit(1)
        os.close(tell)  # or reading would wait for a child that failed
        held = os.read(told, 4)
        os.close(told)
        assert held == b"held"

    def die(self) -> None:
        if self._process:
            os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
            self._process = 0


def test_a_part_that_two_do_at_once_is_whole(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a machine's locks do not reach the other: each is granted the same claim."""
    write(Path("in/a.parquet"), rows_of(0, 20))
    options = Options(["in/*"], Path("out"), rows_per_file=10)
    job, other = prepare(str(model), options), prepare(str(model), options)
    label_rows = predictor.label_rows

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(predictor, "label_rows", label_rows)
        work(other)
        return label_rows(*arguments)

    monkeypatch.setattr(predictor, "label_rows", meanwhile)
    work(job)
    assert pd.read_parquet("out")["id"].tolist() == list(range(20))
    assert not list(Path("out").rglob("*.writing"))


@pytest.mark.parametrize("is_done", [True, False])
def test_an_unfinished_file_that_is_gone(model: Path, monkeypatch: pytest.MonkeyPatch, is_done: bool) -> None:
    """Harmless where the finished one is there: a network's file system may ask for a rename twice."""
    write(Path("in/a.parquet"), rows_of(0, 20))
    replace = Path.replace

    def twice(self: Path, target: Path) -> Path:
        if target.name.startswith("part-"):
            if is_done:
                replace(self, target)
            else:
                self.unlink()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", twice)
    if is_done:
        label(model)
        assert pd.read_parquet("out")["id"].tolist() == list(range(20))
    else:
        with pytest.raises(UserError, match=r"part-00000\.parquet: No such file"):
            label(model)


def test_a_file_system_without_locks(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("accel_trainer.claims.fcntl.lockf", refuse)
    monkeypatch.setattr(bulk_prediction.logger, "propagate", True)
    write(Path("in/a.parquet"), rows_of(0, 50))
    said = []
    for process in (0, 1, 0):
        job = prepare(str(model), Options(["in/*"], Path("out"), rows_per_file=10))
        bulk_prediction.logger.propagate = True
        work(bulk_prediction.Job(**{**vars(job), "process": process, "processes": 2}))
        said.append((len(files()), capsys.readouterr().out))
    assert said == [(3, "out: 3 of 5 files; the other processes do the rest\n"), (5, ""), (5, "out: 50 rows\n")]
    assert "out cannot be locked" in caplog.text


def test_rows_without_text_and_formulas_are_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(0, 30)
    rows[12]["text"], rows[25]["text"], rows[26]["text"] = " ", "", "=1+1"
    write(Path("in/a.parquet"), rows)
    code, said = run(model, capsys, "--input", "in/*", "--output", "out", "--rows_per_file", "10", "--format", "csv")
    assert code == 0
    assert "in/a.parquet, row 13 and 1 more row: there is no text" in said
    assert "out: 1 cell that a spreadsheet would run as a formula begins with an apostrophe: " in said
    assert "in/a.parquet, row 27, column 'text'; --keep_formulas" in said
    assert "out: 30 rows in 3 files, 0 of them" in said
    assert "one: 30 rows in 1 file, 0 of them" in run(model, capsys, "--input", "in/*", "--output", "one")[1]


def test_results_among_the_inputs_are_never_taken_for_them(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write(Path(f"{name}.parquet"), rows_of(0, 20))
    line = ["--input", "**/*.parquet", "*.parquet", "--output", "labelled", "--rows_per_file", "10"]
    for _ in range(2):
        code, said = run(model, capsys, *line)
        assert code == 0, said
        assert len(files("labelled")) == 4
    assert run(model, capsys, "--input", "labelled/*/*", "--output", "labelled")[0] == 2


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[list[str], str]] = {
    "no match": (["--input", "in/*.csv"], r"--input in/\*\.csv: there is no such file, seen from .*correct the path"),
    "a folder": (["--input", "in"], r"--input in: this is a folder; name the files in it, such as 'in/\*\.parquet'"),
    "an address": (["--input", "s3://b/a.parquet"], "only files of this machine"),
    "no table": (["--input", "in/*", "other/notes.md"], r"notes\.md: its extension does not tell the format"),
    "one name": (["--input", "third/b*"], r"third/b\.csv and .*third/b\.jsonl: both would be labelled into out/b"),
    "output among inputs": (["--output", "in"], r"--input in/\*: in/a\.parquet lies in --output in; name another"),
    "inputs in output": (["--input", "in/a.parquet", "--output", "."], r"in/a\.parquet lies in --output \."),
    "a file": (["--output", "other/notes.md"], "other/notes.md: it is a file; name a folder"),
    "the file form": (["--output", "out.csv"], "--output out.csv: this form writes a folder"),
    "something else": (["--output", "other"], r"--output other: there is something else in it, such as a\.csv"),
    "no column": (["--text_column", "review"], r"in/a\.parquet has no column 'review'; it has: id, text; .*--text_column"),
    "no pair column": (["--text_pair_column", "b"], "has no column 'b'; .*--text_pair_column"),
    "in one of them": (["--input", "in/*", "other/z.jsonl"], r"other/z\.jsonl has no column 'text'"),
    "numbers": (["--text_column", "id"], r"in/a\.parquet: column 'id' holds int64, not text"),
    "columns differ": (["--input", "in/*", "other/w.jsonl"], r"'id' is in a\.parquet alone; 'more' is in w\.jsonl alone, so"),
    "types differ": (["--input", "in/*", "other/v.csv"], r"'id' is int64 in a\.parquet and text in v\.csv \(as all of a CSV"),
    "damaged": (["--input", "in/*", "other/d.parquet"], r"other/d\.parquet: the file is damaged"),
    "a broken line": (["--input", "in/*", "other/e.jsonl"], r"other/e\.jsonl, line 2: this is not JSON"),
    "no UTF-8": (["--input", "other/u.csv"], r"other/u\.csv: it begins like UTF-16, not UTF-8; convert the file to UTF-8$"),
    "below a file": (["--output", "in/a.parquet/out"], r"--output in/a\.parquet/out: Not a directory; name a folder that you"),
    "null in parquet": (["--input", "in/*", "other/n.parquet"], r"n\.parquet, row 12: column 'text' holds no text"),
    "null in jsonl": (["--input", "in/*", "other/m.jsonl"], r"m\.jsonl, row 2: column 'text' holds no text"),
    "a link to nothing": (["--input", "in/*", "other/l.parquet"], r"other/l\.parquet: this is a link to nothing, .*other/gone"),
    "a folder among them": (["--input", "*/*"], r"other/s\.parquet: this is a folder; name the files in it: .*/\*\.parquet"),
    "one file twice": (["--input", "in/*", "other/c.parquet"], r"in/a\.parquet and .*other/c\.parquet: both are links to"),
    "nearly one name": (["--input", "third/[Ac]*", "third/a*"], r"third/a\.jsonl: both would be labelled into out/a, which on some"),
    "whole and broken": (["--input", "in/*", "other/f.parquet"], r"'id' is int64 in a\.parquet and double in f\.parquet"),
    "null alone": (["--input", "in/*", "other/o.parquet"], r"o\.parquet, row 1: column 'text' holds no text"),
    "no rows at all": (["--input", "other/h.csv", "other/i.jsonl"], r"other/h\.csv and 1 more: there are no rows to label"),
    "no rows": (["--rows_per_file", "0"], "--rows_per_file 0: give a number of rows"),
    "no tokens": (["--max_tokens_per_device", "0"], "--max_tokens_per_device 0"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_anything_is_computed(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    write(Path("in/a.parquet"), rows_of(0, 20))
    other = Path("other")
    other.mkdir()
    (other / "notes.md").write_text("#")
    write(other / "a.csv", rows_of(0, 3))
    write(other / "v.csv", rows_of(0, 3))
    write(other / "w.jsonl", [{"text": "good", "more": 1}])
    write(other / "z.jsonl", [{"id": 1, "review": "good"}])
    (other / "d.parquet").write_bytes(Path("in/a.parquet").read_bytes()[:-9])
    (other / "e.jsonl").write_text('{"id": 1, "text": "good"}\n{"id": 1, \n')
    write(
        other / "n.parquet",
        [{**row, "text": None if i in (11, 14) else row["text"]} for i, row in enumerate(rows_of(0, 20))],
        5,
    )
    write(other / "m.jsonl", [{"id": 1, "text": "good"}, {"id": 2, "text": None}])
    write(other / "f.parquet", [{"id": 1.5, "text": "good"}])
    write(other / "o.parquet", [{"id": 1, "text": None}])
    Path("third").mkdir()
    for name in ("A.csv", "a.jsonl", "b.csv", "b.jsonl"):
        write(Path("third", name), rows_of(0, 3))
    (other / "u.csv").write_text("id,text\n1,good\n", encoding="utf-16")
    (other / "h.csv").write_text("id,text\n")
    (other / "i.jsonl").touch()
    (other / "l.parquet").symlink_to("gone")
    (other / "c.parquet").symlink_to("../in/a.parquet")
    (other / "s.parquet").mkdir()
    arguments, message = MISTAKES[mistake]
    given = arguments if "--input" in arguments else ["--input", "in/*", *arguments]
    given = given if "--output" in given else [*given, "--output", "out"]
    monkeypatch.setattr(predictor, "label_rows", None)
    before = set(Path().rglob("*"))
    code, said = run(model, capsys, *given)
    assert (code, said.count("error: ")) == (2, 1), said
    assert re.search(message, said), said
    assert "Traceback" not in said
    left = {str(path) for path in set(Path().rglob("*")) - before if path.parts[0] != "cache"}
    assert not left


def test_of_two_jobs_that_begin_at_once_one_gets_the_folder(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen that it is new, and the first writes before the second."""
    write(Path("in/a.parquet"), rows_of(0, 20))

    def late(path: Path) -> Any:
        monkeypatch.setattr(bulk_folder, "created", created)
        label(model, rows_per_file=10)
        return created(path)

    monkeypatch.setattr(bulk_folder, "created", late)
    with pytest.raises(RunFolderError, match="--rows_per_file is 5, and was 10 when the folder was begun"):
        label(model, rows_per_file=5)
    assert len(files()) == 2


def test_a_machine_with_other_files_is_told(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(Path("in/a.parquet"), rows_of(0, 2))
    sent = bulk_prediction.collectives.from_main_process

    def as_the_first_one_has_it(accelerator: Any, value: Any) -> Any:
        return {**value, "inputs": {}} if isinstance(value, dict) and "inputs" in value else sent(accelerator, value)

    monkeypatch.setattr(bulk_prediction.collectives, "from_main_process", as_the_first_one_has_it)
    code, said = run(model, capsys, "--input", "in/*", "--output", "out")
    assert code == 2
    assert "in/a.parquet was not among the inputs on process 0; give all machines the same files and options" in said
    assert not Path("out").exists()


@pytest.mark.parametrize("damage", ["{", "[]", "7", '{"a": ' * 100_000, b"\xff"])
def test_a_damaged_manifest(model: Path, capsys: pytest.CaptureFixture[str], damage: str | bytes) -> None:
    write(Path("in/a.parquet"), rows_of(0, 2))
    Path("out").mkdir()
    Path("out", MANIFEST).write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    code, said = run(model, capsys, "--input", "in/*", "--output", "out")
    assert code == 2
    assert re.search(
        r"--output out/\.manifest\.json: it is damaged \(.+\); name another folder, or delete this one", said
    )
    assert "Traceback" not in said


@pytest.mark.parametrize("changed", ["model", "input", "rows", "columns", "format", "fewer", "more", "renamed"])
def test_a_folder_of_another_job_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: str
) -> None:
    for name in ("a", "b"):
        write(Path(f"in/{name}.parquet"), [{**row, "other": row["text"]} for row in rows_of(0, 20)])
    same = ["--input", "in/*", "--output", "out"]
    assert run(model, capsys, *same)[0] == 0
    before = {path: Path(path).stat().st_mtime_ns for path in files()}
    assert run(model, capsys, *same, "--max_tokens_per_device", "64")[0] == 0  # rounding only
    expected = {
        "model": "the model's model.safetensors is not what it was when the folder was begun",
        "input": "in/b.parquet is not the file that it was when",
        "rows": "--rows_per_file is 5, and was 20000 when",
        "columns": "the column of the text is [other], and was [text] when",
        "format": "--format is csv, and was parquet when",
        "fewer": "in/b.parquet was among the inputs when the folder was begun, and is not now",
        "more": "in/c.parquet was not among the inputs when the folder was begun; label new files alone, into a folder of",
        "renamed": "in/a.parquet would go to in-a/, and went to a/ when",
    }[changed]
    more = {"rows": ["--rows_per_file", "5"], "columns": ["--text_column", "other"], "format": ["--format", "csv"]}
    if changed == "model":
        model = write_model(tmp_path / "another", seed=1)
    elif changed == "input":  # of one size, and the time set back
        status = Path("in/b.parquet").stat()
        Path("in/b.parquet").write_bytes(Path("in/b.parquet").read_bytes().replace(b"good", b"evil"))
        os.utime("in/b.parquet", ns=(status.st_atime_ns, status.st_mtime_ns))
    elif changed == "fewer":
        same[1] = "in/a*"
    elif changed in ("more", "renamed"):
        name = "in/c.parquet" if changed == "more" else "other/a.parquet"
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(Path("in/a.parquet").read_bytes())
        same.insert(1, name)
    code, said = run(model, capsys, *same, *more.get(changed, []))
    assert code == 2
    assert expected in said
    assert ("delete this one" in said) == (changed not in ("more", "renamed"))
    assert {path: Path(path).stat().st_mtime_ns for path in files()} == before


def test_a_folder_of_another_version(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("in/a.parquet"), rows_of(0, 2))
    Path("out").mkdir()
    Path("out", MANIFEST).write_text('{"layout": 1, "inputs": {"a": {"path": "a.parquet", "mtime_ns": 7}}}')
    code, said = run(model, capsys, "--input", "in/*", "--output", "out")
    assert code == 2
    assert "another version of accel_trainer was at work when the folder was begun; give the same" in said


def test_inputs_that_were_copied_elsewhere_are_the_same(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.parquet", "b.csv", "c.jsonl.gz"):
        write(Path("in", name), [{**row, "id": str(row["id"])} for row in rows_of(0, 20)])
    label(model)
    Path("moved").mkdir()
    for path in Path("in").iterdir():
        Path("moved", path.name).write_bytes(path.read_bytes())
        os.utime(Path("moved", path.name), ns=(1, 1))
        path.unlink()
    monkeypatch.setattr(predictor, "label_rows", None)
    label(model, "moved/*")


def test_a_start_that_fails_leaves_what_was_there(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("in/a.parquet"), rows_of(0, 2))
    wrong = ["--input", "in/*", "--output", "out", "--max_tokens_per_device", "0"]
    Path("out").mkdir()
    assert run(model, capsys, *wrong)[0] == 2
    assert not list(Path("out").iterdir())
    label(model)
    before = sorted(Path("out").rglob("*"))
    assert run(model, capsys, *wrong)[0] == 2
    assert sorted(Path("out").rglob("*")) == before


def test_a_start_that_fails_leaves_a_folder_that_another_launch_has_joined(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(Path("in/a.parquet"), rows_of(0, 20))
    on = bulk_prediction.TrainedModel.on

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(bulk_prediction.TrainedModel, "on", on)
        label(model)
        raise UserError("no")

    monkeypatch.setattr(bulk_prediction.TrainedModel, "on", meanwhile)
    with pytest.raises(UserError, match="no"):
        label(model)
    assert sorted(path.name for path in Path("out").iterdir()) == [".claims", MANIFEST, "a"]


@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv"])
def test_a_part_that_was_damaged_is_done_again(model: Path, capsys: pytest.CaptureFixture[str], format: str) -> None:
    write(Path("in/a.parquet"), rows_of(0, 40))
    line = ["--input", "in/*", "--output", "out", "--rows_per_file", "10", "--format", format]
    assert run(model, capsys, *line)[0] == 0
    paths = list(map(Path, files()))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
    paths[1].write_bytes(b"")
    paths[2].write_bytes(before[paths[2]][0][:-7])
    if format == "parquet":
        pq.write_table(pq.read_table(paths[3]).slice(1), paths[3])
    damaged = paths[1:] if format == "parquet" else paths[1:3]
    code, said = run(model, capsys, *line)
    assert code == 0
    for path in paths:
        assert (f"{path}: it is damaged (" in said) == (path in damaged)
        assert path.read_bytes() == before[path][0]
        assert (path.stat().st_mtime_ns == before[path][1]) == (path not in damaged)


def test_each_process_tells_of_the_damage_that_it_finds(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("in/a.parquet"), rows_of(0, 20))
    label(model, rows_per_file=10)
    for path in files():
        Path(path).write_bytes(b"")
    job = prepare(str(model), Options(["in/*"], Path("out"), rows_per_file=10))
    speak_on(False)
    work(bulk_prediction.Job(**{**vars(job), "process": 1, "processes": 2}))
    said = capsys.readouterr().err
    assert [f"{path}: it is damaged" in said for path in files()] == [False, True]


def test_parts_without_rows_are_not_damaged(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("in/a.parquet"), rows_of(0, 4))
    pq.write_table(pq.read_table("in/a.parquet").slice(0, 0), "in/b.parquet")
    for format in ("parquet", "jsonl", "csv"):
        for _ in range(2):
            code, said = run(model, capsys, "--input", "in/*", "--output", format, "--format", format)
            assert code == 0
            assert "damaged" not in said


@pytest.mark.parametrize("when", ["at the start", "at work"])
def test_locks_that_fail_are_told(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """As those of a network's file system, whose server was exchanged."""
    write(Path("in/a.parquet"), rows_of(0, 20))
    lockf, calls = claims.fcntl.lockf, []

    def stale(*arguments: Any) -> Any:
        calls.append(arguments)
        if when == "at the start" or len(calls) > 6:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return lockf(*arguments)

    monkeypatch.setattr(claims.fcntl, "lockf", stale)
    code, said = run(model, capsys, "--input", "in/*", "--output", "out", "--rows_per_file", "10")
    assert code == 2
    assert f"--output out: {os.strerror(errno.ESTALE)}; " in said
    assert "Traceback" not in said
    assert len(files()) == (when == "at work")


def test_a_disk_that_is_full_and_goes_on(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(Path("in/a.parquet"), rows_of(0, 40))
    arguments = ["--input", "in/*", "--output", "out", "--rows_per_file", "10"]
    label_rows, seen = predictor.label_rows, []

    def full(*given: Any) -> Any:
        seen.append(1)
        if len(seen) == 3:
            raise OSError(28, "No space left on device")
        return label_rows(*given)

    with monkeypatch.context() as patch:
        patch.setattr(predictor, "label_rows", full)
        code, said = run(model, capsys, *arguments)
    assert code == 2
    assert "part-00002.parquet: No space left on device; make space" in said
    assert len(files()) == 2
    assert run(model, capsys, *arguments)[0] == 0
    assert pd.read_parquet("out")["id"].tolist() == list(range(40))

"""What patterns find is labelled or refused by name, and what shows without reading every row is told before the work begins."""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from accel_trainer import bulk_inputs, tables
from accel_trainer.bulk_files import find_inputs, output_name
from accel_trainer.bulk_inputs import Input, read_inputs
from accel_trainer.errors import DataError, UserError

OUT = Path("out")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Path("in").mkdir()
    forget()
    yield
    forget()


def forget() -> None:
    """Be as another process."""
    bulk_inputs._prepared.cache_clear()
    bulk_inputs._prepared_data.cache_clear()


def parquet(name: str, table: pa.Table | None = None, **options: Any) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": [name]}) if table is None else table, path, **options)
    return path


def found(*patterns: str, output: Path = OUT) -> list[str]:
    return [str(path.relative_to(Path.cwd())) for path in find_inputs(patterns, output).values()]


def read(*patterns: str) -> list[Input]:
    def columns(name: str, present: Sequence[str]) -> list[str]:
        assert "text" in present, name
        return ["text"]

    return read_inputs(find_inputs(patterns or ["in/*"], OUT), columns)


def cells(source: Input, column: str) -> list[Any]:
    return [cell for table in source.tables(0, source.rows, 6) for cell in table.column(column).to_pylist()]


# --- what patterns find -----------------------------------------------------------------------------------------------


def test_names() -> None:
    names = {"a.parquet": "a", "a.b.csv": "a.b", "a.jsonl.gz": "a", "a.zip": "a", "__x=1.csv": "x-1"}
    assert {name: output_name(Path(name)) for name in names} == names


def test_a_link_to_nothing_is_not_left_out() -> None:
    parquet("in/a.parquet")
    Path("in/b.parquet").symlink_to("annex/b")
    Path("in/c.parquet").symlink_to("c.parquet")
    for pattern in ("in/*", "**/*.parquet", "in/b.parquet"):
        with pytest.raises(
            UserError, match=r"in/b\.parquet: this is a link to nothing, .*annex/b; fetch what it stands"
        ):
            found(pattern)
    with pytest.raises(UserError, match=r"in/c\.parquet: this is a link to nothing"):
        found("in/[ac]*")


def test_a_folder_that_is_called_like_a_file_is_not_left_out() -> None:
    parquet("in/a.parquet")
    parquet("in/c.parquet/part-0.parquet")
    with pytest.raises(
        UserError, match=r"in/c\.parquet: this is a folder; name the files in it: '.*in/c\.parquet/\*\.pa"
    ):
        found("in/*")
    both = ["in/a.parquet", "in/c.parquet/part-0.parquet"]
    assert found("in/**/*.parquet") == both
    assert found("in/*", "in/c.parquet/*.parquet") == both


def test_other_folders_are_passed_over_and_other_files_are_not() -> None:
    parquet("in/more/a.parquet")
    assert found("in/**") == found("in/more/*") == ["in/more/a.parquet"]
    Path("in/more/notes.md").touch()
    with pytest.raises(UserError, match=r"notes\.md: its extension does not tell the format"):
        found("in/**")
    os.mkfifo("in/more/b.csv")
    with pytest.raises(UserError, match=r"b\.csv: this is neither a file nor a folder"):
        found("in/**/*.*[tv]")


def test_a_file_named_twice_is_labelled_once(tmp_path: Path) -> None:
    for name in ("in/a.parquet", "in/[b].parquet"):
        parquet(name)
    Path("in/x").mkdir()
    Path("link").symlink_to("in")
    ways = [
        "in/*",
        "in/a.parquet",
        "in/[b].parquet",
        str(tmp_path / "in/a.parquet"),
        "in/x/../a.parquet",
        "link/*.parquet",
    ]
    assert sorted(find_inputs(ways, OUT)) == ["[b]", "a"]


def test_two_names_of_one_file_are_refused() -> None:
    parquet("in/a.parquet")
    Path("in/b.parquet").symlink_to("a.parquet")
    with pytest.raises(
        UserError, match=r"in/a\.parquet and .*in/b\.parquet: both are links to .*in/a\.parquet, or one"
    ):
        found("in/*")
    assert found("in/b*") == ["in/b.parquet"]


def test_no_way_leads_results_to_the_inputs() -> None:
    parquet("out/a/part-00000.parquet")
    parquet("in/b.parquet")
    Path("in/link.parquet").symlink_to("../out/a/part-00000.parquet")
    Path("in/folder").symlink_to("../out/a")
    Path("out/a/back.parquet").symlink_to("../../in/b.parquet")
    Path("same").symlink_to("out")
    for output in ("out", "same"):
        assert found("in/**/*.parquet", "**/*.parquet", output=Path(output)) == ["in/b.parquet"]
        for pattern in ("out/a/back.parquet", "in/link.parquet", "same/a/*", "in/folder/*"):
            with pytest.raises(UserError, match=rf"lies in --output {output}; name another folder"):
                found(pattern, output=Path(output))


def names(*patterns: str) -> dict[str, str]:
    return {name: str(path.relative_to(Path.cwd())) for name, path in find_inputs(patterns, OUT).items()}


def test_files_of_one_name_are_told_apart_by_their_folders() -> None:
    """As Spark and Hive write them."""
    for name in ("in/lang=en/part-0.parquet", "in/lang=de/part-0.parquet", "in/lang=de/part-1.parquet"):
        parquet(name)
    assert list(names("in/*en/*", "in/*de/*1.parquet")) == ["part-0", "part-1"]
    assert names("in/*/*") == {
        "lang-de-part-0": "in/lang=de/part-0.parquet",
        "lang-de-part-1": "in/lang=de/part-1.parquet",
        "lang-en-part-0": "in/lang=en/part-0.parquet",
    }
    assert list(names("in/*/*").items()) == list(names("in/*en/*", "in/lang=de/*").items())
    parquet("more/_x/PART-0.parquet")
    assert list(names("in/*/*", "more/*/*"))[0::3] == ["in-lang-de-part-0", "more-_x-PART-0"]
    parquet("in/part-0.csv")
    assert sorted(names("in/**"))[-1] == "part-0"
    parquet("in/lang=de-part-0.csv")
    with pytest.raises(UserError, match=r"both would be labelled into out/lang-de-part-0; rename one"):
        names("in/**")


@pytest.mark.parametrize(("one", "other"), [("in/A.parquet", "in/a.csv"), ("in/\xe9.csv", "in/e\u0301.parquet")])
def test_names_that_a_mac_does_not_tell_apart(one: str, other: str) -> None:
    for name in (one, other):
        parquet(name)
    with pytest.raises(UserError, match=r"both would be labelled into out/.*, which on some systems is out/"):
        find_inputs(["in/*"], OUT)


def test_a_bracket_in_the_name_of_a_folder() -> None:
    parquet("in/run[1]/x/a.parquet")
    with pytest.raises(
        UserError, match=r"the \[ of a folder's name is written \[\[\]: 'in/run\[\[\]1\]/x/\*\.parquet'"
    ):
        found("in/run[1]/x/*.parquet")
    assert found("in/run[[]1]/x/*.parquet") == ["in/run[1]/x/a.parquet"]
    with pytest.raises(UserError, match=r"correct the path or pattern$"):
        found("in/run[2]/*.parquet")


@pytest.mark.skipif(sys.platform == "darwin", reason="no file has such a name there")
def test_a_name_that_is_not_utf8() -> None:
    Path(os.fsdecode(b"in/caf\xe9.parquet")).touch()
    with pytest.raises(UserError, match=r"caf\\udce9\.parquet: its name is not UTF-8; rename it") as refused:
        found("in/*")
    str(refused.value).encode()


def test_a_home_that_is_not_there() -> None:
    with pytest.raises(UserError, match="there is no such file"):
        found("~nobody-of-that-name/*.csv")


# --- what is in them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "most", "parts"),
    [
        ((), 10, [(0, 0)]),
        ((0,), 10, [(0, 0)]),
        ((5,), 10, [(0, 5)]),
        ((10, 10), 10, [(0, 10), (10, 20)]),
        ((4, 4, 4, 4), 10, [(0, 8), (8, 16)]),
        ((4, 25, 4), 10, [(0, 4), (4, 14), (14, 24), (24, 33)]),
        ((20, 0, 1), 10, [(0, 10), (10, 20), (20, 21)]),
    ],
)
def test_parts(groups: tuple[int, ...], most: int, parts: list[tuple[int, int]]) -> None:
    source = Input(Path("a.parquet"), "a", 0, 0, pa.schema([]), groups, "")
    assert source.parts(most) == parts


@pytest.mark.parametrize("bounds", [(0, 43), (0, 1), (8, 9), (9, 18), (5, 31), (42, 43)])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_any_rows_are_read(kind: str, bounds: tuple[int, int]) -> None:
    table = pa.table({"id": range(43), "text": ["good"] * 43})
    if kind == "parquet":
        parquet("in/a.parquet", table, row_group_size=9)
    else:
        Path("in/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    (source,) = read()
    parts = list(source.tables(*bounds, 6))
    assert [i for part in parts for i in part.column("id").to_pylist()] == list(range(*bounds))
    assert all(len(part) < 12 for part in parts)
    assert all(len(part) >= 6 for part in parts[:-1])


EMPTY = {
    "a.csv": "",
    "b.csv": "\n\n",
    "c.csv": "id,text\n",
    "d.tsv": "text\tid\n",
    "e.jsonl": "",
    "f.json": "[]",
    "g.ndjson": "\n",
    "h.jsonl.gz": "",
    "i.txt": "",
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_shard_among_others(name: str) -> None:
    opened = gzip.open if name.endswith(".gz") else open
    with opened(Path("in", name), "wt") as file:
        file.write(EMPTY[name])
    parquet("in/m.parquet", pa.table({"id": [7], "text": ["good"]}))
    parquet("in/z.parquet", pa.table({"id": [7], "text": ["good"]}).slice(0, 0))
    inputs = read()
    assert [source.rows for source in inputs] == [0, 1, 0]
    for source in inputs:
        assert {field.name: str(field.type) for field in source.schema} == {"id": "int64", "text": "string"}
        assert source.parts(10) == [(0, source.rows)]
        assert cells(source, "id") == [7] * source.rows
    Path("in/m.parquet").unlink()
    with pytest.raises(
        DataError, match=rf"in/{name} and 1 more: there are no rows to label; name files that have some"
    ):
        read()


def test_an_empty_shard_with_other_columns() -> None:
    parquet("in/a.parquet")
    Path("in/b.csv").write_text("text,more\n")
    with pytest.raises(DataError, match=r"a\.parquet and .*b\.csv: 'more' is in b\.csv alone, so"):
        read()


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("type", [pa.null(), pa.string()])
def test_a_column_without_any_text(kind: str, type: pa.DataType) -> None:
    if kind == "parquet":
        parquet("in/a.parquet", pa.table({"text": pa.array([None, None], type)}))
    else:
        Path("in/a.jsonl").write_text('{"text": null}\n' * 2)
    with pytest.raises(DataError, match=r"in/a\..*, row 1: column 'text' holds no text; complete or remove the row"):
        read()


def test_the_first_missing_text_of_several_row_groups() -> None:
    texts = ["good"] * 25_000 + [None] + ["bad"] * 3
    parquet("in/a.parquet", pa.table({"text": texts}), row_group_size=12_000)
    with pytest.raises(DataError, match="row 25001: column 'text' holds no text"):
        read()


def test_looking_for_missing_texts_reads_no_other_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor any of them where the statistics count none."""
    seen: list[Any] = []
    batches = pq.ParquetFile.iter_batches

    def watched(file: Any, *arguments: Any, **options: Any) -> Any:
        seen.append((options["columns"], options["row_groups"]))
        return batches(file, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    table = pa.table({"text": ["good", "bad", None, "good"], "image": [b"\0" * 9] * 4})
    parquet("in/a.parquet", table, row_group_size=2)
    with pytest.raises(DataError, match="row 3"):
        read()
    assert seen == [(["text"], [1])]
    parquet("in/a.parquet", table.filter(pc.field("text").is_valid()), row_group_size=2)
    assert read()
    assert len(seen) == 1


LARGE = 2**53 + 1
TOGETHER: dict[str, tuple[Any, Any, str]] = {
    "widths": (pa.array([LARGE], pa.int64()), pa.array([1], pa.int8()), "int64"),
    "signs": (pa.array([2**32 - 1], pa.uint32()), pa.array([-1], pa.int16()), "int64"),
    "floats": (pa.array([0.1], pa.float32()), pa.array([0.1], pa.float64()), "double"),
    "null and text": (pa.array([None], pa.null()), pa.array(["x"]), "string"),
    "long texts": (pa.array(["x"]), pa.array(["y"], pa.large_string()), "large_string"),
    "lists": (pa.array([[1]], pa.list_(pa.int8())), pa.array([[LARGE]], pa.list_(pa.int64())), "list<element: int64>"),
    "empty lists": (pa.array([[None]], pa.list_(pa.null())), pa.array([["x"]]), "list<element: string>"),
    "records": (
        pa.array([{"a": 1}], pa.struct([("a", pa.int8())])),
        pa.array([{"a": 2, "b": "x"}]),
        "struct<a: int64, b: string>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOGETHER)
def test_types_that_go_together(case: str) -> None:
    one, other, common = TOGETHER[case]
    for name, column in (("a", one), ("b", other)):
        parquet(f"in/{name}.parquet", pa.table({"text": ["good"], "v": column}))
    inputs = read()
    assert [str(source.schema.field("v").type) for source in inputs] == [common, common]
    wanted = [one.to_pylist(), other.to_pylist()]
    if case == "records":
        wanted[0] = [{"a": 1, "b": None}]
    assert [cells(source, "v") for source in inputs] == wanted


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.int64(), pa.float64()),
        (pa.int8(), pa.float64()),
        (pa.uint64(), pa.int64()),
        (pa.list_(pa.int64()), pa.list_(pa.float64())),
        (pa.struct([("a", pa.int64())]), pa.struct([("a", pa.float32())])),
        (pa.timestamp("s"), pa.timestamp("ns")),
        (pa.string(), pa.binary()),
        (pa.bool_(), pa.int8()),
    ],
)
def test_types_of_which_one_would_lose_something_do_not(one: pa.DataType, other: pa.DataType) -> None:
    for kinds in ((one, other), (other, one)):
        for name, kind in zip("ab", kinds, strict=True):
            parquet(f"in/{name}.parquet", pa.table({"text": ["good"], "v": pa.array([None], kind)}))
        with pytest.raises(DataError, match=r"'v' is \S.* in a\.parquet and \S.* in b\.parquet, so that no one table"):
            read()


def test_what_differs_is_told_in_words() -> None:
    parquet("in/a.parquet", pa.table({"text": ["x"], "id": pa.array([None], pa.null()), "y": [1]}))
    parquet("in/b.parquet", pa.table({"text": ["x"], "id": [7], "y": [1]}))
    parquet("in/c/b.parquet", pa.table({"text": pa.array(["x"], pa.large_string()), "id": ["7"], "z": [1]}))
    with pytest.raises(DataError) as refused:
        read("in/**/*.parquet")
    said = str(refused.value).replace(f"{Path.cwd()}/", "")
    told = [
        "'y' is in a.parquet alone",
        "'z' is in b.parquet alone",
        "'id' is int64 in in/b.parquet and text in in/c/b.parquet",  # a third file's, as those of null go with all
    ]
    assert said.startswith(f"in/a.parquet and in/c/b.parquet: {'; '.join(told)}, so that")


def test_values_that_do_not_fit_are_no_damage() -> None:
    parquet("in/a.parquet", pa.table({"text": ["good"], "v": [LARGE]}))
    (source,) = read()
    planned = Input(**{**vars(source), "schema": pa.schema([("text", pa.string()), ("v", pa.float64())])})
    with pytest.raises(
        DataError, match=r"a\.parquet: its values do not fit into the types that all files have"
    ) as refused:
        cells(planned, "v")
    assert "damaged" not in str(refused.value)


# --- what is prepared -------------------------------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files whose bytes are hashed."""
    names: list[str] = []
    prepared = tables._prepared

    def counted(file: Any, encoding: Any) -> Path:
        names.append(file.path.name)
        return prepared(file, encoding)

    monkeypatch.setattr(tables, "_prepared", counted)
    return names


def test_a_file_is_hashed_once_on_a_machine(hashed: list[str]) -> None:
    names = [f"{i}.jsonl" for i in range(6)]
    for name in names:
        Path("in", name).write_text(json.dumps({"text": name}) + "\n")
    for _ in range(2):
        assert [cells(source, "text") for source in read()] == [[name] for name in names]
        assert hashed == names
        forget()


@pytest.mark.parametrize("how", ["content", "note", "copy"])
def test_what_has_changed_is_hashed_again(hashed: list[str], how: str) -> None:
    path = Path("in/a.jsonl")
    path.write_text('{"text": "good"}\n')
    status = path.stat()
    read()
    forget()
    wanted = "good"
    cache = Path("cache/accel_trainer")
    if how == "content":  # of one length, and the times set back: only what nobody can set tells
        path.write_text('{"text": "evil"}\n')
        while path.stat().st_mtime_ns != status.st_mtime_ns or path.stat().st_ctime_ns == status.st_ctime_ns:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        wanted = "evil"
    elif how == "note":
        next(cache.glob("*.prepared")).write_bytes(b"\xff\0")
    else:
        next(cache.glob("*.arrow")).unlink()
    (source,) = read()
    assert cells(source, "text") == [wanted]
    assert hashed == ["a.jsonl"] * 2


def test_a_cache_without_room_for_notes(hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bulk_inputs, "replaced", full)
    names = [f"{i}.jsonl" for i in range(6)]
    for name in names:
        Path("in", name).write_text(json.dumps({"text": name}) + "\n")
    for times in (1, 2):
        assert [cells(source, "text") for source in read()] == [[name] for name in names]
        assert hashed == names * times
        forget()

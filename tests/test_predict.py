"""Files are labelled in order, whatever their size and kind; scores on other data are those of training."""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from harness import Outcome, alone_on_the_cpu, run_trainer, write_recipe_in
from support import reviews, write_csv

from accel_trainer import predict
from accel_trainer.errors import DataError, OutOfMemory, UserError
from accel_trainer.predict import Predictor, evaluate_file, load_predictor, predict_file, predict_texts
from accel_trainer.prediction_files import open_writer
from accel_trainer.tracking import speak_on


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run that has learnt something, with a learning rate in exponent form and labels that YAML 1.1 misreads."""
    place = tmp_path_factory.mktemp("predict")
    table = write_csv(
        place / "reviews.csv", [(text, "yes" if label == "positive" else "no") for text, label in reviews(90)]
    )
    recipe = write_recipe_in(
        place,
        dataset={"path": str(table), "labels": ["no", "yes"]},
        training={"learning_rate": 2e-2, "num_train_epochs": 3, "adam_epsilon": 1e-8},
        evaluation={"metrics": ["accuracy", "f1", "matthews_correlation"], "average": "weighted"},
    )
    outcome = run_trainer(recipe, place / "run")
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.fixture
def predictor(run: Outcome, tmp_path: Path) -> Iterator[Predictor]:
    with alone_on_the_cpu(tmp_path / "cache"):
        yield load_predictor(str(run.folder))


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """More rows than are taken at once, with all that makes a CSV cell difficult."""
    monkeypatch.setattr(predict, "ROWS_AT_ONCE", 4)
    rows = [{"id": f"0{i}", "text": text} for i, (text, _) in enumerate(reviews(11, seed=2))]
    rows[3]["text"] = 'good, "very"\nsoup 面'
    rows[7]["text"] = ""
    return rows


def expected(predictor: Predictor, rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [predict_texts(predictor, [row["text"]])[0] for row in rows]


def check(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert [row["prediction"] for row in found] == [row["prediction"] for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)


def test_texts_in_order(predictor: Predictor) -> None:
    texts = [text for text, _ in reviews(9, seed=4)]
    together = predict_texts(predictor, texts)
    check(together, [predict_texts(predictor, [text])[0] for text in texts])
    assert len({json.dumps(record) for record in together}) > 1
    assert {record["prediction"] for record in together} <= {"no", "yes"}
    for record in together:
        assert sum(record["probabilities"].values()) == pytest.approx(1)


def test_jsonl_to_jsonl(predictor: Predictor, many: list[dict[str, str]], tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "deep" / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in many), encoding="utf-8")
    assert predict_file(predictor, source, target, None) == 11
    found = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [{"id": row["id"], "text": row["text"]} for row in found] == many
    check(found, expected(predictor, many))
    assert [path.name for path in target.parent.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_csv_to_csv(
    predictor: Predictor, many: list[dict[str, str]], tmp_path: Path, suffix: str, delimiter: str
) -> None:
    many[7]["text"] = "a\rb"
    source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    with source.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(many)
    predict_file(predictor, source, target, "text")
    with target.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file, delimiter=delimiter))
    assert [{"id": row["id"], "text": row["text"]} for row in found] == many
    for row in found:
        row["probabilities"] = {name: float(row[f"probability_{name}"]) for name in ("no", "yes")}
    check(found, expected(predictor, many))


def test_rows_without_text_are_labelled_and_told(
    predictor: Predictor, many: list[dict[str, str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> list[str]:
        caplog.clear()
        source.write_text("".join(json.dumps(row) + "\n" for row in many), encoding="utf-8")
        assert predict_file(predictor, source, tmp_path / "out.jsonl", None) == 11
        return [record.getMessage() for record in caplog.records]

    source = tmp_path / "in.jsonl"
    assert [message.split(":")[0] for message in told()] == [f"{source}, row 8"]
    many[2]["text"] = many[10]["text"] = " \u3000"
    assert [message.split(":")[0] for message in told()] == [f"{source}, row 3 and 2 more rows"]
    many[2]["text"] = many[7]["text"] = many[10]["text"] = "good"
    assert told() == []


RUN = [
    "=cmd|' /C calc'!A0",
    "=1+1",
    "+good",
    "-good soup",
    "@good",
    "\t=1+1",
    "\r=1",
    "-1 good",
    "--1",
    "+1e",
    "-٣",
    "-",
]
NOT_RUN = ["-1.5e3", "+7", "-.5", "good = bad", "'=1", " =1", "1-1", "good\n=1", "差"]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_no_spreadsheet_runs_a_cell(
    predictor: Predictor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    kept: bool,
) -> None:
    monkeypatch.setattr(predict.logger, "propagate", False)
    monkeypatch.setattr(predict, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(predictor, "label_names", ["-no", "=yes"])
    speak_on(True)
    rows = [{"=id": -i, "text": text} for i, text in enumerate([*RUN, *NOT_RUN])]
    source, target = tmp_path / "in.jsonl", tmp_path / f"out{suffix}"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    predict_file(predictor, source, target, None, keep_formulas=kept)
    said = capsys.readouterr().err
    if suffix in (".csv", ".tsv"):
        with target.open(encoding="utf-8", newline="") as file:
            header, *found = csv.reader(file, delimiter="," if suffix == ".csv" else "\t")
        mark = "" if kept else "'"
        assert header == [f"{mark}=id", "text", "prediction", "probability_-no", "probability_=yes"]
        assert [row[:2] for row in found] == [
            [str(-i), f"{mark}{text}" if text in RUN else text] for i, text in enumerate([*RUN, *NOT_RUN])
        ]
        assert {row[2] for row in found} <= {f"{mark}-no", f"{mark}=yes"}
        count = 1 + len(RUN) + len(found)
        assert said == "" if kept else f"{target}: {count} cells that a spreadsheet would run" in said
        assert kept or "with an apostrophe, the first: the column name '=id';" in said
        return
    assert said == ""
    if suffix == ".jsonl":
        records = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    else:
        records = pyarrow.parquet.read_table(target).to_pylist()
    assert [{name: record[name] for name in ("=id", "text")} for record in records] == rows
    assert {record["prediction"] for record in records} <= {"-no", "=yes"}


def test_parquet_to_parquet(predictor: Predictor, many: list[dict[str, str]], tmp_path: Path) -> None:
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, "n": 1.5} for row in many]), source)
    predict_file(predictor, source, target, None)
    table = pyarrow.parquet.read_table(target)
    assert table.schema.names == ["id", "text", "n", "prediction", "probabilities"]
    found = table.to_pylist()
    assert [{"id": row["id"], "text": row["text"]} for row in found] == many
    check(found, expected(predictor, many))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_what_json_and_csv_have_no_cell_for(kind: str, tmp_path: Path) -> None:
    """Numbers that are none, at any depth, and bytes."""
    strange = {"v": float("nan"), "in": {"list": [1.5, float("-inf"), None], "n": 1}, "b": b"\xff\0", "deep": [b"a"]}
    table, target = pyarrow.Table.from_pylist([strange]), tmp_path / f"out.{kind}"
    with open_writer(target, ["bad", "good"], table.schema) as writer:
        writer.write(table, ["good"], np.asarray([[0.25, 0.75]]))
    if kind == "csv":
        (row,) = csv.DictReader(io.StringIO(target.read_text()))
        assert base64.b64decode(row["b"]) == b"\xff\0"
        return

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(target.read_text(), parse_constant=refuse) == {
        "v": None,
        "in": {"list": [1.5, None, None], "n": 1},
        "b": base64.b64encode(b"\xff\0").decode(),
        "deep": ["YQ=="],
        "prediction": "good",
        "probabilities": {"bad": 0.25, "good": 0.75},
    }


def test_labelled_again(predictor: Predictor, many: list[dict[str, str]], tmp_path: Path) -> None:
    """What was written can be read, and its own columns do not come twice."""
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in many), encoding="utf-8")
    predict_file(predictor, source, first, None)
    predict_file(predictor, first, second, None)
    assert second.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("budget", [1, 50, 10_000])
def test_the_budget_changes_nothing(run: Outcome, tmp_path: Path, budget: int) -> None:
    texts = [text for text, _ in reviews(9, seed=4)]
    with alone_on_the_cpu(tmp_path / "cache"):
        one = load_predictor(str(run.folder), max_tokens_per_device=budget)
        other = load_predictor(str(run.folder))
        check(predict_texts(one, texts), predict_texts(other, texts))


def test_out_of_memory_takes_fewer_at_a_time(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text for text, _ in reviews(30)]
    whole = predictor.logits(texts)
    compute, sizes = predictor.model.model.forward, []

    def holds(most: int) -> None:
        def forward(**inputs: Any) -> Any:
            sizes.append(inputs["input_ids"].numel())
            if sizes[-1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return compute(**inputs)

        monkeypatch.setattr(predictor.model.model, "forward", forward)

    holds(100)
    np.testing.assert_allclose(predictor.logits(texts), whole, rtol=0, atol=1e-5)
    assert predictor.max_tokens == 64
    assert [size for size in sizes if size > 100] == [366, 186, 126]  # all texts, then what 256 and 128 tokens hold
    holds(0)
    with pytest.raises(OutOfMemory, match="a single text does not fit"):
        predictor.logits(texts)


def test_an_unknown_suffix(predictor: Predictor, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "in.csv", reviews(3))
    with pytest.raises(UserError, match=r"--output .*out\.xlsx: unknown kind of file '\.xlsx'"):
        predict_file(predictor, source, tmp_path / "out.xlsx", None)
    assert not (tmp_path / "out.xlsx").exists()


def test_a_target_that_cannot_be(predictor: Predictor, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "in.csv", reviews(3))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output "):
        predict_file(predictor, source, tmp_path / "file" / "out.csv", None)


def test_a_missing_column(predictor: Predictor, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "in.csv", reviews(3), ("review", "stars"))
    with pytest.raises(DataError, match=r"in\.csv has no column 'text'; it has: review, stars; name .*--text_column"):
        predict_file(predictor, source, tmp_path / "out.csv", None)
    assert predict_file(predictor, source, tmp_path / "out.csv", "review") == 3


def test_no_recipe_key_is_named_for_an_encoding(predictor: Predictor, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("text,label\ngood,yes\n", encoding="utf-16")
    for use in (
        lambda: predict_file(predictor, source, tmp_path / "out.csv", None),
        lambda: evaluate_file(predictor, source),
    ):
        with pytest.raises(DataError, match=r"begins like UTF-16, not UTF-8; convert the file to UTF-8$"):
            use()


@pytest.mark.parametrize("cell", [None, 3])
def test_a_row_without_text_is_named(
    predictor: Predictor, many: list[dict[str, Any]], tmp_path: Path, cell: int | None
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows: list[Any] = [{"text": row["text"]} for row in many]
    rows[9]["text"] = cell if cell is None else None  # a column has one type; null among texts
    if cell is not None:
        rows = [{"text": i} for i in range(11)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    target.write_text("what was there")
    with pytest.raises(DataError, match=r"in\.jsonl, (row|line) \d+.*'text' holds") as caught:
        predict_file(predictor, source, target, None)
    if cell is None:
        assert "9" in str(caught.value) or "10" in str(caught.value)
    assert target.read_text() == "what was there"
    assert not list(tmp_path.glob(".*.writing"))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_scores_on_other_data_are_those_of_training(
    run: Outcome, predictor: Predictor, tmp_path: Path, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "ROWS_AT_ONCE", 7)
    lines = (run.folder / "predictions" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    source = write_csv(tmp_path / "same.csv", [(row["text"], row["label"]) for row in rows])
    scores, text = evaluate_file(predictor, source)
    trained = run.json("results.json")[split]
    assert set(scores) == set(trained)
    assert scores["loss"] == pytest.approx(trained["loss"], abs=1e-6)
    for name in ("accuracy", "f1", "matthews_correlation"):
        assert scores[name] == pytest.approx(trained[name], abs=1e-9)
    assert scores["confusion_matrix"] == trained["confusion_matrix"]
    assert "confusion matrix" in text
    found = predict_texts(predictor, [row["text"] for row in rows])
    check(found, rows)


def test_labels_that_cannot_be_scored(predictor: Predictor, tmp_path: Path) -> None:
    unknown = write_csv(tmp_path / "unknown.csv", [("good soup", "maybe"), ("cold soup", "no")])
    with pytest.raises(DataError, match="maybe"):
        evaluate_file(predictor, unknown)
    without = write_csv(tmp_path / "without.csv", [("good soup", "yes"), ("cold soup", "")])
    with pytest.raises(DataError):
        evaluate_file(predictor, without)
    other = write_csv(tmp_path / "other.csv", [("good soup", "yes"), ("cold soup", "no")], ("t", "l"))
    scores, _ = evaluate_file(predictor, other, "t", "l")
    assert sum(map(sum, scores["confusion_matrix"])) == 2


def test_a_run_a_model_and_the_best(run: Outcome, tmp_path: Path) -> None:
    texts = [text for text, _ in reviews(3)]
    with alone_on_the_cpu(tmp_path / "cache"):
        found = [load_predictor(str(run.folder / name)) for name in ("", "model", "best")]
        for predictor in found:
            assert predictor.label_names == ["no", "yes"]
            assert predictor.max_length == 16
            assert predictor.recipe is not None
            check(predict_texts(predictor, texts), predict_texts(found[0], texts))


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_predictor(str(tmp_path / "nowhere"))
    (tmp_path / "status.json").write_text("{}")
    with pytest.raises(UserError, match="the run has no model yet"):
        load_predictor(str(tmp_path))


def test_two_labels_of_one_name(run: Outcome, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(run.folder / "model", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "id2label": {"0": "yes", "1": "yes"}}))
    with pytest.raises(UserError, match=r"model: two labels are named 'yes'; give each a name in `id2label`"):
        load_predictor(str(model))


def test_the_output_is_named_in_any_script_on_any_stream(
    run: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_csv(tmp_path / "in.csv", [["good", 1]], ["text", "n"])
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, encoding="ascii"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with alone_on_the_cpu(tmp_path / "cache"):
        assert predict.main([str(run.folder), "--input", str(source), "--output=~/面"]) == 0
    assert (tmp_path / "面/in/part-00000.parquet").exists()
    assert said.getvalue().endswith(rb"/\u9762: 1 row" + b"\n")


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize("first_kind", ["csv", "jsonl", "parquet"])
def test_labelled_again_in_another_kind(
    predictor: Predictor, many: list[dict[str, str]], tmp_path: Path, first_kind: str, kind: str
) -> None:
    """The columns that were added are replaced, whatever they held, and come once."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in many), encoding="utf-8")
    first, direct, again = tmp_path / f"first.{first_kind}", tmp_path / f"direct.{kind}", tmp_path / f"again.{kind}"
    predict_file(predictor, source, first, None)
    if first_kind == "csv":
        text = first.read_text(encoding="utf-8")
        first.write_text(text.replace(",yes,", ",of another model,").replace(",no,", ",of another,"), encoding="utf-8")
    predict_file(predictor, source, direct, None)
    predict_file(predictor, first, again, None)
    if kind == "parquet":
        assert pyarrow.parquet.read_table(again).to_pylist() == pyarrow.parquet.read_table(direct).to_pylist()
    else:
        assert again.read_bytes() == direct.read_bytes()


def test_a_recipe_of_another_version(
    run: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict.logger, "propagate", False)
    speak_on(True)
    texts = [text for text, _ in reviews(3)]
    anchored = (run.folder / "recipe.yaml").read_text(encoding="utf-8").replace("seed: 42", "seed: &a 42")
    assert "&a" in anchored
    for name, text in (("key", "training: {of_tomorrow: 1}\n"), ("yaml", "a: ["), ("anchor", anchored)):
        folder = tmp_path / name
        shutil.copytree(run.folder, folder)
        (folder / "recipe.yaml").write_text(text, encoding="utf-8")
        with alone_on_the_cpu(tmp_path / "cache"):
            predictor = load_predictor(str(folder))
            assert predictor.recipe is None
            check(predict_texts(predictor, texts), predict_texts(load_predictor(str(run.folder)), texts))
            scores, _ = evaluate_file(predictor, write_csv(tmp_path / "in.csv", [("good", "yes"), ("cold", "no")]))
        assert "accuracy" in scores
        shown = capsys.readouterr().err
        assert f"{folder / 'recipe.yaml'}: not a recipe of this version; columns and metrics are the usual" in shown
        assert "Traceback" not in shown


@pytest.mark.parametrize("trusted", [True, False])
def test_trust_reaches_the_metrics(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    asked: list[bool] = []
    load = predict.metrics.load_metrics
    monkeypatch.setattr(
        predict.metrics,
        "load_metrics",
        lambda names, *, allow_remote_code: (asked.append(allow_remote_code), load(names))[1],
    )
    source = write_csv(tmp_path / "in.csv", [("good", "yes"), ("cold", "no")])
    evaluate_file(predictor, source, trust_remote_code=trusted)
    assert asked == [trusted]


@pytest.mark.parametrize(
    "name", ["runs/quikstart", "./runs/quikstart", "{here}/runs/quikstart", "runs/quickstart/modle"]
)
def test_a_mistyped_folder_is_no_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart" / "model").mkdir(parents=True)
    meant = r"quickstart/model\?" if name.endswith("modle") else r"runs/quickstart\?"
    with pytest.raises(UserError, match=f"no such folder .did you mean .*{meant}"):
        load_predictor(name.format(here=tmp_path))

"""The verbs that need no launcher."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from harness import Outcome, alone_on_the_cpu, python, run_trainer, write_recipe_in
from support import reviews, write_csv

from accel_trainer import cli


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    place = tmp_path_factory.mktemp("cli")
    outcome = run_trainer(write_recipe_in(place, training={"max_steps": 3}), place / "run")
    assert outcome.code == 0, outcome.err
    return outcome


def call(*arguments: str, cache: Path) -> int:
    with alone_on_the_cpu(cache):
        return cli.main(list(arguments))


LIGHT = """
import sys
from accel_trainer.cli import main
for arguments in (["--help"], ["predict", "--help"], ["check", "tiny.yaml"], ["show", "tiny.yaml", "training.seed=3"]):
    try:
        assert main(arguments) == 0, arguments
    except SystemExit as end:
        assert end.code == 0, arguments
heavy = {"torch", "transformers", "datasets", "accelerate"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_show_and_check_are_light(tmp_path: Path) -> None:
    write_recipe_in(tmp_path)
    done = python(LIGHT, tmp_path)
    assert done.code == 0, done.err
    assert "tiny.yaml: no mistakes" in done.out
    assert "usage: accel-trainer" in done.out


def test_show_is_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe_in(tmp_path)
    assert cli.main(["show", str(recipe), "training.learning_rate=2e-5", "training.seed=7"]) == 0
    text = capsys.readouterr().out
    shown = yaml.safe_load(text)
    assert shown["training"]["learning_rate"] == 2e-5
    assert shown["training"]["seed"] == 7
    assert shown["training"]["lr_scheduler_type"] == "linear"
    again = tmp_path / "again.yaml"
    again.write_text(text, encoding="utf-8")
    assert cli.main(["show", str(again)]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == shown


def test_check_tells_all_mistakes_of_all_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_recipe_in(tmp_path, "good.yaml")
    bad = write_recipe_in(tmp_path, "bad.yaml", training={"learning_rat": 1, "global_batch_size": 0})
    assert cli.main(["check", str(bad), str(good), "nowhere"]) == 2
    shown = capsys.readouterr()
    assert f"{good}: no mistakes" in shown.out
    for said in ("learning_rat", "global_batch_size", "nowhere: no such recipe"):
        assert said in shown.err
    assert cli.main(["check", str(good)]) == 0


def test_predict_text(run: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = call("predict", str(run.folder), "--text", "good soup", "--text", "凉了", cache=tmp_path)
    assert code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("good soup")
    assert lines[1].endswith("凉了")
    for line in lines:
        words = line.split()
        assert words[0] == words[1]
        assert words[0] in ("negative", "positive")
        assert float(words[2]) >= 0.5


def test_predict_file_and_evaluate(run: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = write_csv(tmp_path / "in.csv", reviews(5)), tmp_path / "out.jsonl"
    assert call("predict", str(run.folder), "--input", str(source), "--output", str(target), cache=tmp_path) == 0
    assert "5 rows" in capsys.readouterr().out
    assert len(target.read_text(encoding="utf-8").splitlines()) == 5
    scores = tmp_path / "scores.json"
    assert call("evaluate", str(run.folder), "--input", str(source), "--output", str(scores), cache=tmp_path) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(shown) == {"loss", "accuracy", "f1"}
    assert {name: json.loads(scores.read_text())[name] for name in shown} == shown


FORMULAS = """
import sys
from accel_trainer.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("options", "written", "said"),
    [
        ((), "'=1+1 soup", "out.csv: 1 cell that a spreadsheet would run as a formula begins with an apostrophe"),
        (("--keep_formulas",), "=1+1 soup", ""),
    ],
)
def test_formulas_are_told_on_stderr(
    run: Outcome, tmp_path: Path, options: tuple[str, ...], written: str, said: str
) -> None:
    write_csv(tmp_path / "in.csv", [("=1+1 soup", "positive")])
    files = ["--input", "in.csv", "--output", "out.csv"]
    done = python(FORMULAS, tmp_path, "predict", str(run.folder), *files, *options, ACCELERATE_USE_CPU="true")
    assert done.code == 0, done.err
    assert (tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()[1].startswith(f"{written},positive,")
    assert said in done.err
    assert ("formula" in done.err) == bool(said)
    assert "out.csv: 1 row\n" in done.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --text, or --input together with --output"),
        (["--text", "a", "--input", "b", "--output", "c"], "give --text, or --input"),
        (["--input", "b"], "--input together with --output"),
        (["--text", "a", "--output", "c"], "give --text, or --input"),
        (["--text", "a", "--text_pair", "b", "--text_pair", "c"], "as many --text_pair as --text"),
        (["--text", "a"], "cannot load 'nowhere'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("predict", "nowhere", *arguments, cache=tmp_path) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert said in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("value", ["0", "-5"])
def test_a_budget_is_positive(run: Outcome, tmp_path: Path, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("predict", str(run.folder), "--text", "a", f"--max_tokens_per_device={value}", cache=tmp_path) == 2
    shown = capsys.readouterr()
    assert shown.err == f"error: --max_tokens_per_device {value}: give a positive number of tokens\n"


OLD_SPELLINGS = """
import sys
from accel_trainer.cli import main
assert main(["check", "old.yaml"]) == 0
assert main(["show", "old.yaml", "training.lr=0.5"]) == 0
"""


def test_old_spellings_are_told_on_stderr(tmp_path: Path) -> None:
    recipe = write_recipe_in(tmp_path, "old.yaml")
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    values["training"]["num_epochs"] = values["training"].pop("num_train_epochs")
    values["training"]["optim"] = "adamw_hf"
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    done = python(OLD_SPELLINGS, tmp_path)
    assert done.code == 0, done.err
    told = [
        "old.yaml: training.num_epochs is read as training.num_train_epochs",
        "old.yaml: training.optim: adamw_hf is read as adamw_torch",
    ]
    assert sorted(re.sub(r":\d+:", ":", line) for line in done.err.splitlines()) == sorted(
        [*told, *told, "command line: training.lr is read as training.learning_rate"]
    )
    first, shown = done.out.split("\n", 1)
    assert first == "old.yaml: no mistakes; its data were not read (--data reads them)"
    assert yaml.safe_load(shown)["training"]["learning_rate"] == 0.5


def test_a_verb_that_is_interrupted_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "list", cli.VERBS["list"]._replace(run=interrupted))
    assert cli.main(["list"]) == 75
    assert capsys.readouterr() == ("", "interrupted\n")

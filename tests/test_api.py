"""`from accel_trainer import load_recipe, train, predict` does what the commands do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, alone_on_the_cpu, run_trainer, start, write_recipe_in

import accel_trainer
from accel_trainer.errors import RecipeError, UserError


def test_training_is_that_of_the_command_and_its_model_predicts(tmp_path: Path) -> None:
    recipe = write_recipe_in(tmp_path)
    command = run_trainer(recipe, tmp_path / "command", "training.seed=7")
    with alone_on_the_cpu(tmp_path / "cache"):
        results = accel_trainer.train(recipe, "training.seed=7", output_dir=tmp_path / "function")
        loaded = accel_trainer.load_recipe(recipe, "training.seed=7")
        again = accel_trainer.train(loaded, output_dir=str(tmp_path / "loaded"))
        (labelled,) = accel_trainer.predict(tmp_path / "function", "worth the wait")
        with pytest.raises(UserError, match="a run lies there already"):
            accel_trainer.train(recipe, output_dir=tmp_path / "function")
    assert results == json.loads((tmp_path / "function" / "results.json").read_text())
    assert results["test"] == command.json("results.json")["test"] == again["test"]
    for name in ("function", "loaded"):
        weights = (tmp_path / name / "model" / "model.safetensors").read_bytes()
        assert weights == (command.folder / "model" / "model.safetensors").read_bytes()
    assert set(labelled) == {"prediction", "probabilities"}
    assert json.loads((tmp_path / "function" / "run.json").read_text())["recipe"]["overrides"] == ["training.seed=7"]


def test_mistakes_are_raised(tmp_path: Path) -> None:
    recipe = write_recipe_in(tmp_path)
    with pytest.raises(RecipeError, match=r"training.sede.*seed"):
        accel_trainer.load_recipe(recipe, "training.sede=7")
    with pytest.raises(UserError, match="no such recipe"):
        accel_trainer.train("no/such")
    with pytest.raises(UserError, match="give overrides to load_recipe"):
        accel_trainer.train(accel_trainer.load_recipe(recipe), "training.seed=7", output_dir=tmp_path / "run")
    for options, told in (
        ({"learning_rate": 1}, r"no option learning_rate; values of the recipe are given as section\.key=value"),
        ({"dryrun": True}, "no option dryrun; did you mean dry_run"),
        ({"layout": "paked"}, "--layout paked: choose from auto, packed, padded"),
    ):
        with pytest.raises(UserError, match=told):
            accel_trainer.train(recipe, **options)
    with pytest.raises(UserError, match="text 1 is None"):
        accel_trainer.predict("nowhere", ["a", None])  # type: ignore[list-item]
    assert accel_trainer.predict("nowhere", []) == []
    with pytest.raises(UserError, match="1 texts and 2 second texts"):
        accel_trainer.predict("nowhere", "one", ["a", "b"])


def test_importing_the_package_is_light() -> None:
    program = (
        "import sys, accel_trainer; accel_trainer.load_recipe('quickstart'); "
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    with pytest.raises(ImportError):
        from accel_trainer import nothing_of_the_kind  # noqa: F401


@pytest.mark.launch
def test_a_notebook_launches_it_on_two_processes(tmp_path: Path) -> None:
    """As docs/python.md shows it; what comes before the launch must not spoil the fork."""
    recipe = write_recipe_in(tmp_path)
    program = f"""
from accelerate import notebook_launcher
from accel_trainer import load_recipe, predict, train
load_recipe({str(recipe)!r})
notebook_launcher(train, args=({str(recipe)!r}, "training.seed=7", ), num_processes=2)
print(predict("runs/tiny", ["worth the wait"])[0]["prediction"])
"""
    (tmp_path / "cells.py").write_text(program)
    ended = start([sys.executable, "cells.py"], tmp_path)
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "runs/tiny/run.json").read_text())["hardware"]["num_processes"] == 2
    alone = run_trainer(recipe, tmp_path / "alone", "training.seed=7")
    two = json.loads((tmp_path / "runs/tiny/results.json").read_text())
    assert two["test"]["loss"] == pytest.approx(alone.json("results.json")["test"]["loss"], abs=1e-5)

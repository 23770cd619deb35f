"""`--dry_run`: two real steps with all that a run does, and nothing left."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from harness import Outcome, run_trainer, signal_at, write_recipe_in

from accel_trainer import rehearsal
from accel_trainer.inputs import read_inputs
from accel_trainer.recipe_file import load_recipe
from accel_trainer.run_folder import RunFolder


def dry_run(recipe: Path, folder: Path, *arguments: str) -> Outcome:
    return run_trainer(recipe, folder, "--dry_run", *arguments)


def test_it_takes_two_steps_goes_back_and_leaves_nothing(tmp_path: Path) -> None:
    recipe = write_recipe_in(tmp_path, training={"num_train_epochs": 50, "max_steps": None, "warmup_steps": 9})
    ended = dry_run(recipe, tmp_path / "run")
    assert ended.code == 0, ended.err
    assert ended.err.count("step 2/2") == 2
    assert "continuing from" in ended.err
    assert "0e+00" in ended.out  # the second step was repeated to the bit
    assert "GiB" in ended.out
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run.dry_run").exists()


@pytest.mark.parametrize(
    "override",
    ["evaluation.eval_strategy=no", "saving.save_strategy=no", "saving.load_best_model_at_end=false", "training.max_steps=1",
     "evaluation.early_stopping_patience=1", "training.global_batch_size=1000"],
)  # fmt: skip
def test_it_works_with(override: str, tmp_path: Path) -> None:
    recipe = write_recipe_in(tmp_path)
    ended = dry_run(recipe, tmp_path / "run", override)
    assert ended.code == 0, ended.err
    assert list(tmp_path.glob("run*")) == []


def test_a_run_that_is_there_is_not_touched(tmp_path: Path) -> None:
    recipe = write_recipe_in(tmp_path)
    first = run_trainer(recipe, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    assert dry_run(recipe, tmp_path / "run").code == 0
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before


def test_what_a_killed_one_left_is_replaced_and_what_is_not_its_own_is_kept(tmp_path: Path) -> None:
    recipe, left = write_recipe_in(tmp_path), tmp_path / "run.dry_run"
    (left / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (left / "status.json").write_text(json.dumps({"state": "running"}))
    (left / ".dry_run").touch()
    assert dry_run(recipe, tmp_path / "run").code == 0
    left.mkdir()
    (left / "thesis.tex").write_text("years of work")
    refused = dry_run(recipe, tmp_path / "run")
    assert refused.code == 2
    assert "run.dry_run, which holds something else" in refused.err
    assert (left / "thesis.tex").read_text() == "years of work"


def test_a_run_of_that_name_is_no_rehearsal(tmp_path: Path) -> None:
    recipe = write_recipe_in(tmp_path)
    first = run_trainer(recipe, tmp_path / "run.dry_run")
    assert first.code == 0, first.err
    refused = dry_run(recipe, tmp_path / "run")
    assert refused.code == 2
    assert "holds something else" in refused.err
    assert (first.folder / "results.json").exists()


def test_folders_that_it_made_go_too(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    with rehearsal.leaving_nothing(RunFolder(tmp_path / "kept" / "new" / "newer" / "run.dry_run")):
        assert (tmp_path / "kept" / "new" / "newer" / "run.dry_run").is_dir()
    assert list((tmp_path / "kept").iterdir()) == []


def test_the_root_is_no_folder_for_a_run(tmp_path: Path) -> None:
    nameless = dry_run(write_recipe_in(tmp_path), Path("/"))
    assert nameless.code == 2
    assert "name a folder for the run" in nameless.err


@pytest.mark.parametrize("option", [["--resume"], ["--stop_after", "1"]])
def test_options_that_make_no_sense_are_refused(option: list[str], tmp_path: Path) -> None:
    ended = dry_run(write_recipe_in(tmp_path), tmp_path / "run", *option)
    assert ended.code == 2
    assert ended.err.startswith("error: --dry_run: it takes steps of its own")  # before anything is read
    assert list(tmp_path.glob("run*")) == []


def test_a_signal_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    recipe = write_recipe_in(tmp_path)
    for step in (1, 2):
        with signal_at(step, signal.SIGTERM):
            ended = dry_run(recipe, tmp_path / "run")
        assert ended.code == 75, ended.err
        assert list(tmp_path.glob("run*")) == []


def test_a_failure_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    recipe = write_recipe_in(tmp_path)
    ended = dry_run(
        recipe,
        tmp_path / "run",
        "training.learning_rate=1e38",
        "training.optim=sgd",
        "training.max_grad_norm=null",
        "training.warmup_steps=0",
    )
    assert ended.code == 1, ended.err
    assert "not finite" in ended.err
    assert list(tmp_path.glob("run*")) == []


def test_the_slices_are_the_longest_rows_and_the_steps_are_the_recipes(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe_in(tmp_path, rows=200))
    inputs = read_inputs(recipe)
    short = rehearsal.shortened_inputs(inputs)
    for role, split in inputs.splits.items():
        size = min(len(split), 64)
        slice_ = short.splits[role]
        assert len(slice_) == len(slice_.rows.labels) == len(slice_.tokens) == size
        assert sorted(slice_.tokens.lengths) == sorted(split.tokens.lengths)[-size:]
        at = {split.rows.place(row): row for row in range(len(split))}
        for row in range(size):
            there = at[slice_.rows.place(row)]
            assert slice_.rows.labels[row] == split.rows.labels[there]
            for name, column in slice_.tokens.columns.items():
                assert np.array_equal(column[row], split.tokens.columns[name][there])
    changed = {"max_steps", "warmup_steps"}
    assert short.recipe.training.model_dump(exclude=changed) == inputs.recipe.training.model_dump(exclude=changed)
    assert (short.recipe.dataset, short.recipe.model) == (inputs.recipe.dataset, inputs.recipe.model)


def test_a_step_that_is_not_repeated_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    train = {"train_runtime": 1.0, "steps": 2, "tokens": 10, "evaluation_runtime": 1.0, "saving_runtime": 1.0}
    rehearsal.show({"train": train}, [0.7, 0.5], [0.7, 0.6], 2**30)
    assert "does not repeat the step" in capsys.readouterr().out
    rehearsal.show({"train": train}, [0.7, 0.5], [0.7, 0.5], 2**30)
    assert "does not repeat the step" not in capsys.readouterr().out

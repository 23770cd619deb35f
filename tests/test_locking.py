"""A recipe that was locked trains as it did, or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import NO_DROPOUT, alone_on_the_cpu, run_trainer, write_recipe_in
from hub_cache import write_checkpoint
from support import reviews, write_csv

from accel_trainer import locking, recipe_edit
from accel_trainer.errors import UserError
from accel_trainer.locking import lock_recipe
from accel_trainer.recipe_file import load_recipe


@pytest.fixture(autouse=True)
def no_launch(tmp_path: Path) -> Iterator[None]:
    with alone_on_the_cpu(tmp_path / "cache"):
        yield


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with comments, and a checkpoint beside it."""
    write_checkpoint(tmp_path / "checkpoint")
    model = {"from_config": None, "train_tokenizer": None, "checkpoint": "checkpoint"}
    path = write_recipe_in(tmp_path, model=model, training={"max_steps": 3})
    path.write_text("# A header\n" + path.read_text(encoding="utf-8") + "# A footer\n", encoding="utf-8")
    return path


def test_a_locked_recipe_holds_what_a_run_of_it_pins(recipe: Path, tmp_path: Path) -> None:
    before = recipe.read_text(encoding="utf-8")
    unlocked = load_recipe(recipe)
    assert lock_recipe(str(recipe)) == recipe
    after = recipe.read_text(encoding="utf-8")
    assert [line for line in before.splitlines() if line not in after.splitlines()] == []
    locked = load_recipe(recipe)
    assert locked.dataset.sha256 is not None
    assert set(locked.dataset.sha256) == {"train", "validation", "test"}
    assert set(locked.model.sha256 or {}) == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for section in ("dataset", "model"):
        bare, full = (getattr(one, section).model_dump(exclude={"sha256"}) for one in (unlocked, locked))
        assert bare == full

    run = run_trainer(recipe, tmp_path / "run")
    assert run.code == 0, run.err
    pinned = load_recipe(run.folder / "recipe.yaml")
    assert pinned.model == locked.model
    assert pinned.dataset.sha256 == locked.dataset.sha256

    assert lock_recipe(str(recipe)) == recipe
    assert recipe.read_text(encoding="utf-8") == after


def test_the_recipe_of_a_run_is_locked_and_repeats_it(recipe: Path, tmp_path: Path) -> None:
    first = run_trainer(recipe, tmp_path / "first")
    assert first.code == 0, first.err
    again = run_trainer(first.folder / "recipe.yaml", tmp_path / "again")
    assert again.code == 0, again.err
    assert again.lines == first.lines
    assert again.weights_sha256 == first.weights_sha256
    for name in ("recipe.yaml", "run.json"):
        assert (again.folder / name).exists()
    assert yaml.safe_load((again.folder / "recipe.yaml").read_text("utf-8")) == yaml.safe_load(
        (first.folder / "recipe.yaml").read_text("utf-8")
    )


@pytest.mark.parametrize("changed", ["weights", "tokenizer", "rows"])
def test_other_bytes_are_not_trained_on(recipe: Path, tmp_path: Path, changed: str) -> None:
    lock_recipe(str(recipe))
    named = {"weights": "model.safetensors", "tokenizer": "tokenizer.json", "rows": "dataset.sha256.train"}[changed]
    if changed == "weights":
        write_checkpoint(tmp_path / "checkpoint", seed=1)
    elif changed == "tokenizer":
        file = tmp_path / "checkpoint" / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8"))), encoding="utf-8")
    else:
        write_csv(tmp_path / "reviews.csv", reviews(90, seed=1))
    refused = run_trainer(recipe, tmp_path / "run")
    assert refused.code == 2
    assert named in refused.err
    assert "was locked to" in refused.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()

    lock_recipe(str(recipe))  # anew, to what is there now
    assert run_trainer(recipe, tmp_path / "run").code == 0


def test_a_new_model_is_locked_to_its_rows(tmp_path: Path) -> None:
    path = write_recipe_in(tmp_path, model=NO_DROPOUT)
    locked = load_recipe(lock_recipe(str(path)))
    assert locked.model.sha256 is None
    assert locked.dataset.sha256 is not None


def test_what_may_not_be_written_costs_no_reading(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_edit, "HF_HUB_CACHE", str(recipe.parent))
    monkeypatch.setattr(locking, "read_inputs", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(UserError, match="belongs to the Hub's cache"):
        lock_recipe(str(recipe))


def test_what_an_editor_changed_meanwhile_stays(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = locking.read_inputs

    def read_slowly(*arguments: Any, **options: Any) -> Any:
        recipe.write_text(recipe.read_text(encoding="utf-8") + "# mine\n", encoding="utf-8")
        return read(*arguments, **options)

    monkeypatch.setattr(locking, "read_inputs", read_slowly)
    with pytest.raises(UserError, match=r"tiny\.yaml: another program has changed it meanwhile"):
        lock_recipe(str(recipe))
    text = recipe.read_text(encoding="utf-8")
    assert text.endswith("# mine\n")
    assert "sha256" not in text


def test_only_revisions_can_be_given(recipe: Path) -> None:
    before = recipe.read_bytes()
    with pytest.raises(UserError, match=r"lock: training\.seed would change the recipe"):
        lock_recipe(str(recipe), ["model.revision=main", "training.seed=3"])
    assert recipe.read_bytes() == before
    with pytest.raises(UserError, match=r"lock: model\.revision: what is read has no revisions"):
        lock_recipe(str(recipe), ["model.revision=main"])
    assert recipe.read_bytes() == before


def test_weights_that_lie_elsewhere_cannot_be_locked(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accel_trainer.model_files._Repository.reads", lambda self, file: file == "config.json")
    before = recipe.read_bytes()
    with pytest.raises(UserError, match=r"the weights of .*checkpoint' lie in no file"):
        lock_recipe(str(recipe))
    assert recipe.read_bytes() == before


def test_locking_to_other_bytes_is_told(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock_recipe(str(recipe))
    write_checkpoint(recipe.parent / "checkpoint", seed=1)
    with caplog.at_level("WARNING", "accel_trainer"):
        lock_recipe(str(recipe))
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "model.sha256: it was locked to other bytes before (model.safetensors)"
    ]


def test_the_record_of_a_run_and_what_ships_elsewhere_are_not_changed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    kept = recipe.rename(run / "recipe.yaml")
    with pytest.raises(UserError, match="it is what a run did"):
        lock_recipe(str(kept))
    monkeypatch.setenv("ACCEL_TRAINER_RECIPES", "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="it ships with accel_trainer, in a checkout that is not this folder; copy it"):
        lock_recipe("quickstart")

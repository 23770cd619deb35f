"""The Hub, without a network: a cache folder that the test builds, as a download would have left it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
import yaml
from harness import start
from hub_cache import COMMIT, snapshot, write_checkpoint, write_dataset
from support import tiny_recipe

from accel_trainer.hub import is_on_hub, use_cache_if_unreachable


def test_hub_ids_train_from_a_cache_and_are_pinned(tmp_path: Path) -> None:
    home = tmp_path / "hf-home"
    data = snapshot(home, "dataset", "team/reviews")
    write_dataset(data)
    checkpoint = snapshot(home, "model", "team/tiny-bert")
    write_checkpoint(checkpoint)

    values = tiny_recipe(tmp_path)
    values["dataset"] = {
        "path": "team/reviews",
        "name": "food",
        "splits": {"train": "train", "validation": "validation"},
        "labels": ["negative", "positive"],
        "max_length": 16,
    }
    values["model"] = {"checkpoint": "team/tiny-bert"}
    recipe = tmp_path / "hub.yaml"
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    run = start(
        [sys.executable, "-m", "accel_trainer.train", str(recipe), "--output_dir", "run"],
        tmp_path,
        HF_HOME=str(home),
        ACCELERATE_USE_CPU="true",
    )
    assert run.code == 0, run.err
    pinned = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8"))
    assert pinned["dataset"]["path"] == "team/reviews"
    assert pinned["dataset"]["revision"] == COMMIT["dataset"]
    assert pinned["model"]["checkpoint"] == "team/tiny-bert"
    assert pinned["model"]["revision"] == COMMIT["model"]
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert pinned["model"]["sha256"].keys() == files

    locked = start([sys.executable, "-m", "accel_trainer.cli", "lock", "hub.yaml"], tmp_path, HF_HOME=str(home))
    assert locked.code == 0, locked.err
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    for section, key in (("model", "revision"), ("model", "sha256"), ("dataset", "revision"), ("dataset", "sha256")):
        assert values[section][key] == pinned[section][key]

    # The run's own recipe, while nobody answers.
    down = start(
        [sys.executable, "-m", "accel_trainer.train", "run/recipe.yaml", "--output_dir", "down"],
        tmp_path,
        HF_HOME=str(home),
        ACCELERATE_USE_CPU="true",
        HF_HUB_OFFLINE="0",
        HF_ENDPOINT="http://127.0.0.1:9",  # nobody answers
    )
    assert down.code == 0, down.err
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "down" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert yaml.safe_load((tmp_path / "down" / "recipe.yaml").read_text(encoding="utf-8")) == pinned

    missing = start(
        [
            sys.executable,
            "-m",
            "accel_trainer.train",
            str(recipe),
            "model.checkpoint=team/another",
            "--output_dir",
            "no",
        ],
        tmp_path,
        HF_HOME=str(home),
        ACCELERATE_USE_CPU="true",
    )
    assert missing.code == 2
    assert "model.checkpoint" in missing.err
    assert "team/another" in missing.err
    assert "Traceback" not in missing.err


class Session:
    """A client whose every request is answered alike."""

    def __init__(self, answer: int | Exception) -> None:
        self.answer, self.asked = answer, 0

    def head(self, address: str, timeout: float) -> Any:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return SimpleNamespace(status_code=self.answer)


@pytest.mark.parametrize(
    ("answer", "offline"), [(200, False), (401, False), (404, False), (503, True), (ConnectionError("x"), True)]
)
def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch, answer: int | Exception, offline: bool) -> None:
    session = Session(answer)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    for _ in range(2):
        use_cache_if_unreachable()
    assert huggingface_hub.constants.is_offline_mode() is offline
    assert datasets.config.HF_HUB_OFFLINE is offline
    assert session.asked == (1 if offline else 2)


def test_local_names_are_not_asked_of_the_hub(tmp_path: Path) -> None:
    assert not is_on_hub(None)
    assert not is_on_hub(str(tmp_path))
    assert is_on_hub("google-bert/bert-base-chinese")

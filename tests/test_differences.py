"""What a difference means follows from the key, and for every key of a recipe there is a meaning."""

from __future__ import annotations

import pytest
from sample_files import MINIMAL

from accel_trainer.differences import IN_WORDS, PLACES, differences, flat, in_groups, meaning, short
from accel_trainer.recipe import Recipe
from accel_trainer.recipe_file import parse_recipe

MEANINGS = {
    "problem_type": "steps",
    "training.seed": "steps",
    "training.lr_scheduler_kwargs.power": "steps",
    "dataset.splits.train": "steps",
    "dataset.max_train_samples": "steps",
    "dataset.text_column": "steps",
    "model.hidden_dropout": "steps",
    "labels": "steps",
    "tokenizer": "steps",
    "config.layer_norm_eps": "steps",
    "data.train": "data",
    "dataset.path": "data",
    "dataset.data_files": "data",
    "dataset.data_files.train": "data",
    "dataset.sha256.train": "data",
    "model.checkpoint": "data",
    "model.sha256.config.json": "data",
    "model.tokenizer_revision": "data",
    "data.validation": "scores",
    "dataset.splits.test": "scores",
    "dataset.data_files.validation": "scores",
    "dataset.sha256.test": "scores",
    "dataset.max_eval_samples": "scores",
    "evaluation.metrics": "scores",
    "saving.load_best_model_at_end": "scores",
    "description": "nothing",
    "derived_from": "nothing",
    "saving.save_steps": "nothing",
    "tracking.logging_steps": "nothing",
    "results.test.f1": "result",
    "hardware.num_processes": "rounding",
    "versions.torch": "rounding",
    "initial_weights_sha256": "steps",
}


@pytest.mark.parametrize("key", MEANINGS)
def test_meanings(key: str) -> None:
    assert meaning(key) == MEANINGS[key]
    assert MEANINGS[key] in IN_WORDS


def test_places_are_keys_of_the_recipe() -> None:
    for section, keys in PLACES.items():
        fields = Recipe.model_fields[section].annotation
        assert fields is not None
        assert set(keys) < set(fields.model_fields)


def test_every_key_that_differs_is_found_once() -> None:
    one = parse_recipe(MINIMAL, "r").model_dump()
    other = parse_recipe(
        MINIMAL, "r", ["training.seed=7", "model.hidden_dropout=0.5", "dataset.labels=[a, b]"]
    ).model_dump()
    assert differences(one, one) == []
    assert differences(one, other) == [
        ("dataset.labels", None, ["a", "b"]),
        ("model.hidden_dropout", None, 0.5),
        ("training.seed", 42, 7),
    ]
    assert [(key, after, before) for key, before, after in differences(other, one)] == differences(one, other)


def test_sections_keep_together() -> None:
    assert [key for key, _, _ in differences({"a": {"x": 1}, "b": 2}, {"b": 3, "a": {"y": 1}, "c": {}})] == [
        "a.x",
        "a.y",
        "b",
        "c",
    ]
    assert flat({"a": {"b": {"c": 1}, "d": {}}, "e": []}) == {"a.b.c": 1, "a.d": {}, "e": []}


def test_values_are_shown_short() -> None:
    assert short("0123456789abcdef" * 4) == "0123456789ab…"
    assert short(None) == "null"
    assert short(True) == "true"
    assert short(["a", "b"]) == "[a, b]"
    assert short(1e-05) == "1e-05"
    long = short("a" * 40 + "b" * 40)
    assert len(long) <= 60
    assert long.startswith("aaa")
    assert long.endswith("bbb")


def test_differences_are_told_in_groups() -> None:
    changed = [("training.seed", 1, 2), ("data.train", "a" * 64, "b" * 64), ("model.freeze_layers", 0, 1)]
    assert in_groups(changed, "before", "now") == (
        "other steps:\n  training.seed: 1 before, 2 now\n  model.freeze_layers: 0 before, 1 now\n"
        "other data or weights:\n  data.train: aaaaaaaaaaaa… before, bbbbbbbbbbbb… now"
    )

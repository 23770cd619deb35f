"""Every name and value of the tables is accepted, or refused with its answer and nothing else."""

from __future__ import annotations

import logging

import pytest
from sample_files import MINIMAL

from accel_trainer.errors import RecipeError
from accel_trainer.recipe import Recipe
from accel_trainer.recipe_file import parse_recipe
from accel_trainer.spellings import ANSWERED, ANSWERED_VALUES, RENAMED


def value_at(dotted: str, recipe: Recipe) -> object:
    value: object = recipe.model_dump()
    for name in dotted.split("."):
        assert isinstance(value, dict)
        value = value[name]
    return value


# Values for new keys, that the minimal recipe lacks or may change.
SAMPLES = {
    "evaluation.metric_for_best_model": "f1",
    "evaluation.eval_strategy": "no",
    "evaluation.metrics": "f1",
    "training.warmup_steps": "0.5",
    "training.learning_rate": "0.5",
    "training.num_train_epochs": "3",
    "training.max_steps": "7",
    "training.lr_scheduler_type": "cosine",
    "training.label_smoothing_factor": "0.1",
    "training.max_grad_norm": "2.0",
    "training.optim": "sgd",
    "training.layerwise_lr_decay": "0.9",
    "dataset.max_length": "64",
    "dataset.path": "org/other",
    "dataset.name": "sst2",
    "dataset.revision": "main",
    "dataset.data_files.train": "a.csv",
    "dataset.data_files.validation": "b.csv",
    "dataset.data_files.test": "c.csv",
    "dataset.splits.train": "train[:9]",
    "dataset.splits.validation": "dev",
    "dataset.splits.test": "test",
    "dataset.text_column": "body",
    "dataset.label_column": "stars",
    "dataset.max_eval_samples": "5",
    "dataset.max_predict_samples": "6",
    "model.checkpoint": "org/other",
    "model.revision": "main",
    "model.tokenizer": "org/tokenizer",
    "model.attention_dropout": "0.2",
    "model.hidden_dropout": "0.3",
    "tracking.project_name": "mine",
}


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_an_old_name_means_the_new_one(old: str, caplog: pytest.LogCaptureFixture) -> None:
    new = RENAMED[old].new
    section = new.split(".")[0]
    text = MINIMAL.replace("max_steps: 10", "num_train_epochs: 1")  # which would win over epochs
    expected = value_at(
        new, parse_recipe(text, "r", [f"{new}={SAMPLES[new]}" if "metrics" not in new else f"{new}=[f1]"])
    )
    with caplog.at_level(logging.INFO, "accel_trainer"):
        for place in (old, f"training.{old}", f"{section}.{old}"):
            caplog.clear()
            assert value_at(new, parse_recipe(text, "r", [f"{place}={SAMPLES[new]}"])) == expected
            assert [record.getMessage() for record in caplog.records] == [f"command line: {place} is read as {new}"]


@pytest.mark.parametrize("name", sorted(ANSWERED))
@pytest.mark.parametrize("section", ["", "training."])
def test_an_answered_name_gets_its_answer_and_nothing_else(name: str, section: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(MINIMAL, "r", [f"{section}{name}=1"])
    (mistake,) = caught.value.mistakes
    assert mistake.key == f"{section}{name}"
    assert mistake.what.startswith(ANSWERED[name].what)
    assert mistake.remedy == ANSWERED[name].remedy


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in ANSWERED_VALUES.items() for value in values]
)
def test_answered_values_are_refused_with_their_answer(key: str, value: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(MINIMAL, "r", [f"{key}={value}"])
    (mistake,) = caught.value.mistakes
    assert ANSWERED_VALUES[key][value].what in mistake.what


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.optim=adamw_torch_fused", "adamw_torch"),
        ("training.optim=adamw_hf", "adamw_torch"),
        ("evaluation.metric_for_best_model=eval_f1", "f1"),
        ("evaluation.metric_for_best_model=eval_loss", "loss"),
        ("tracking.report_to=none", []),
        ("tracking.report_to=tensorboard", ["tensorboard"]),
    ],
)
def test_old_values_are_translated(override: str, expected: object) -> None:
    assert value_at(override.split("=")[0], parse_recipe(MINIMAL, "r", [override])) == expected


def test_no_limit_is_null() -> None:
    recipe = parse_recipe(MINIMAL, "r", ["training.max_steps=-1", "training.num_train_epochs=2"])
    assert recipe.training.max_steps is None

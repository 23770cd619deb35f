"""The meaning of a recipe, without YAML."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from typing import Any

import pytest
from pydantic import ValidationError

from accel_trainer.recipe import LOWER_IS_BETTER, RULES_LATER, SCHEDULER_KWARGS, SHIPPED_METRICS, Broken, Recipe

MINIMAL: dict[str, Any] = {
    "dataset": {"path": "org/data", "splits": {"train": "train", "validation": "validation"}},
    "model": {"checkpoint": "org/model"},
    "training": {"global_batch_size": 8, "max_steps": 10, "learning_rate": 1e-5},
}

# (what is changed in MINIMAL, the fields that the broken rules blame)
RULES: list[tuple[dict[str, Any], list[str]]] = [
    ({"dataset.splits.validation": 0.2}, ["train"]),
    ({"dataset.splits.train": 0.8, "dataset.splits.validation": 0.3}, ["train"]),
    ({"dataset.splits.train": "train[:"}, ["train"]),
    ({"dataset.splits.test": "test[0]"}, ["test"]),
    ({"dataset.path": None}, ["path"]),
    ({"dataset.path": None, "dataset.data_files": []}, ["path"]),
    ({"dataset.labels": ["a"]}, ["labels"]),
    ({"dataset.labels": {"1": "a", "2": "a"}}, ["labels"]),
    ({"dataset.labels": ["a", "b", "a"]}, ["labels"]),
    ({"dataset.text_pair_column": "text"}, ["text_pair_column"]),
    ({"model.checkpoint": None}, ["checkpoint"]),
    ({"model.from_config": {"model_type": "bert"}}, ["checkpoint", "from_config"]),
    ({"model.checkpoint": None, "model.from_config": {}, "model.tokenizer": "org/t"}, ["from_config"]),
    ({"model.train_tokenizer": {}}, ["train_tokenizer"]),
    ({"training.max_steps": None}, ["num_train_epochs"]),
    ({"training.warmup_steps": 1.5}, ["warmup_steps"]),
    ({"training.warmup_steps": 11}, ["warmup_steps"]),
    ({"training.lr_scheduler_kwargs": {"power": 2}}, ["lr_scheduler_kwargs"]),
    ({"training.lr_scheduler_type": "warmup_stable_decay"}, ["lr_scheduler_kwargs"]),
    ({"training.lr_scheduler_type": "constant", "training.warmup_steps": 1}, ["warmup_steps"]),
    ({"training.lr_scheduler_type": "constant", "training.warmup_steps": 0.1}, ["warmup_steps"]),
    *(
        (
            {
                "training.lr_scheduler_type": "warmup_stable_decay",
                "training.lr_scheduler_kwargs": {"num_decay_steps": 2, "decay_type": curve},
            },
            ["lr_scheduler_kwargs"],
        )
        for curve in ("line", 3)
    ),
    (
        {"training.lr_scheduler_type": "polynomial", "training.lr_scheduler_kwargs": {"power": "2"}},
        ["lr_scheduler_kwargs"],
    ),
    ({"evaluation.metrics": ["org/m"], "evaluation.metric_for_best_model": "m_f1"}, ["metric_for_best_model"]),
    ({"evaluation.metrics": ["f1"], "evaluation.metric_for_best_model": "f1_macro"}, ["metric_for_best_model"]),
    ({"training.lr_scheduler_type": "cosine_with_min_lr"}, ["lr_scheduler_kwargs"]),
    ({"evaluation.metrics": ["f1", "f1"]}, ["metrics"]),
    ({"evaluation.metric_for_best_model": "f2"}, ["metric_for_best_model"]),
    ({"evaluation.eval_strategy": "no", "evaluation.early_stopping_patience": 1}, ["early_stopping_patience"]),
    ({"saving.save_strategy": "steps"}, ["save_steps"]),
    (
        {"dataset.splits.validation": None, "evaluation.early_stopping_patience": 1},
        ["evaluation.early_stopping_patience"],
    ),
    (
        {"dataset.splits.validation": None, "evaluation.metric_for_best_model": "f1"},
        ["evaluation.metric_for_best_model"],
    ),
    ({"dataset.labels": ["a", "b", "c"], "evaluation.average": "binary"}, ["evaluation.average"]),
]


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    values = deepcopy(MINIMAL)
    for dotted, value in changes.items():
        *outer, last = dotted.split(".")
        section = values
        for name in outer:
            section = section.setdefault(name, {})
        section[last] = value
    return values


def test_the_minimal_recipe_holds() -> None:
    recipe = Recipe.model_validate(MINIMAL)
    assert recipe.evaluates
    assert recipe.eval_steps == recipe.tracking.logging_steps
    assert recipe.evaluation.best_metric in LOWER_IS_BETTER
    assert not recipe.evaluation.best_is_greater
    assert set(recipe.evaluation.metrics) <= set(SHIPPED_METRICS)


@pytest.mark.parametrize(("changes", "blamed"), RULES, ids=lambda case: str(case)[:60])
def test_rules_blame_the_field(changes: dict[str, Any], blamed: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(changed(changes))
    broken: list[Broken] = [rule for error in caught.value.errors() for rule in error["ctx"]["broken"]]
    assert [rule.field for rule in broken] == blamed
    assert all(rule.what and rule.remedy for rule in broken)
    Recipe.model_validate(changed(changes), context=RULES_LATER)


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Recipe.model_validate(MINIMAL).training.seed = 1  # type: ignore[misc]


def test_every_schedule_has_its_arguments() -> None:
    schedules = Recipe.model_json_schema()["$defs"]["TrainingSection"]["properties"]["lr_scheduler_type"]["enum"]
    assert set(schedules) == set(SCHEDULER_KWARGS)


def test_every_field_is_described() -> None:
    for name, section in Recipe.model_json_schema()["$defs"].items():
        for field, schema in section["properties"].items():
            assert "description" in schema or "$ref" in schema or field == "train_tokenizer", (name, field)


@pytest.mark.parametrize("module", ["recipe", "recipe_file", "spellings"])
def test_reading_a_recipe_imports_no_heavy_library(module: str) -> None:
    code = f"import sys, accel_trainer.{module}; print(*{{'torch', 'transformers', 'datasets'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""

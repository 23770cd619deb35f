"""What recipes record: which result counts, and the number and the words that speak for it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_recipe

from accel_trainer.errors import UserError
from accel_trainer.recipe import DatasetSection, Recipe
from accel_trainer.results import check_tolerance, dataset_named, newest, rounded, score

RESULT: dict[str, Any] = {
    "date": "2026-03-01",
    "step": 12,
    "metrics": {"validation": {"accuracy": 0.8, "f1": 0.75}, "test": {"loss": 0.5, "accuracy": 0.7}},
    "hardware": "1 process, cpu, float32",
    "duration": 3725.4,
}


def recipe_of(*results: dict[str, Any], **evaluation: Any) -> Recipe:
    values = tiny_recipe(Path("reviews.csv"), evaluation={"metrics": ["accuracy", "f1"], **evaluation})
    return Recipe.model_validate({**values, "results": list(results)})


def test_the_number_that_speaks_for_a_recipe() -> None:
    best = {"metric_for_best_model": "f1"}
    assert score(recipe_of()) is None
    assert score(recipe_of(RESULT, metric_for_best_model="accuracy")) == ("test", "accuracy", 0.7)
    assert score(recipe_of(RESULT, **best)) == ("validation", "f1", 0.75)  # the test rows may be unlabelled
    assert score(recipe_of({**RESULT, "metrics": {"test": {"loss": 0.5}}}, **best)) is None
    assert score(recipe_of(RESULT)) == ("test", "accuracy", 0.7)  # not the loss, by default
    assert score(recipe_of(RESULT, metrics=[])) == ("test", "loss", 0.5)


@given(st.lists(st.sampled_from(["2024-12-31", "2025-01-01", "2025-01-02"]), min_size=1, max_size=5))
def test_the_newest_result_is_the_last_of_the_latest_day(days: list[str]) -> None:
    results = recipe_of(*({**RESULT, "date": day, "step": i} for i, day in enumerate(days))).results
    found = newest(results)
    assert found is not None
    assert found.date == max(days)
    assert found.step == max(i for i, day in enumerate(days) if day == max(days))


@pytest.mark.parametrize(
    ("named", "shown"),
    [
        ({"path": "nyu-mll/glue", "name": "sst2"}, "nyu-mll/glue (sst2)"),
        ({"path": "https://host/a/data/", "data_files": "x.csv"}, "https://host/a/data/"),
        ({"path": "team/data", "data_files": "a.csv"}, "team/data"),
        ({"data_files": {"train": "data/a/x.csv", "test": ["data/a/y.csv"]}}, "data/a"),
        ({"data_files": ["a.csv", "b/c.csv"]}, "a.csv, b/c.csv"),
        ({"data_files": ["a.csv", "b.csv"]}, "a.csv, b.csv"),
        ({"data_files": "data/a.csv"}, "data/a.csv"),
        ({"data_files": ["/data/a.csv", "b.csv"]}, "/data/a.csv, b.csv"),
    ],
)
def test_the_dataset_in_a_word(named: dict[str, Any], shown: str) -> None:
    assert dataset_named(DatasetSection.model_validate({**named, "splits": {"train": "train"}})) == shown


@given(st.floats(-1e300, 1e300) | st.integers(-(10**300), 10**300))
def test_six_digits_are_kept(value: float) -> None:
    assert abs(rounded(value) - value) <= 5.0001e-6 * abs(value)
    assert rounded(rounded(value)) == rounded(value)


def test_a_tolerance_is_a_distance() -> None:
    for tolerance in (None, 0, 0.01, 1e9):
        check_tolerance(tolerance)
    for tolerance in (-0.1, math.inf, math.nan):
        with pytest.raises(UserError, match=r"--tolerance .*: give the largest difference to accept"):
            check_tolerance(tolerance)

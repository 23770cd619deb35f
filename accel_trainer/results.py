"""What recipes record: the result that counts, the number that speaks for it, and how it is named and rounded."""

from __future__ import annotations

import math
import posixpath
from collections.abc import Sequence
from typing import NamedTuple

from accel_trainer.errors import UserError
from accel_trainer.recipe import DatasetSection, ModelSection, Recipe, Result

DIGITS = 6  # significant ones of a recorded metric


class Score(NamedTuple):
    """The number that speaks for a result."""

    role: str
    metric: str
    value: float


def newest(results: Sequence[Result]) -> Result | None:
    """The result of the latest day, the last one of that day."""
    return max(reversed(results), key=lambda result: result.date, default=None)


def chosen_metric(recipe: Recipe) -> str:
    """The metric that decides which weights are best; where nothing but the loss does, the first metric."""
    return recipe.evaluation.metric_for_best_model or next(iter(recipe.evaluation.metrics), "loss")


def score(recipe: Recipe) -> Score | None:
    """The newest result's value of the metric that speaks for the recipe: on the test rows, else on the validation rows."""
    result, metric = newest(recipe.results), chosen_metric(recipe)
    if result is None:
        return None
    roles = (role for role in ("test", "validation") if metric in result.metrics.get(role, {}))
    return next((Score(role, metric, result.metrics[role][metric]) for role in roles), None)


def checkpoint_named(model: ModelSection) -> str:
    """What a recipe trains, in a word or two."""
    return model.checkpoint or f"new {(model.from_config or {})['model_type']}"


def dataset_named(dataset: DatasetSection) -> str:
    """What a recipe trains on: the Hub's name of it, a folder, a file, or an address."""
    if dataset.path is not None and "://" in dataset.path:
        return dataset.path
    if dataset.path is not None:
        return f"{dataset.path} ({dataset.name})" if dataset.name else dataset.path
    files = dataset.data_files or []
    groups = [files] if isinstance(files, str) else files.values() if isinstance(files, dict) else files
    names = [name for group in groups for name in ([group] if isinstance(group, str) else group)]
    folders = {posixpath.dirname(name) for name in names}
    return folders.pop() if len(names) > 1 and len(folders) == 1 and "" not in folders else ", ".join(names)


def rounded(value: float, digits: int = DIGITS) -> float:
    """A number with so many significant digits."""
    return float(f"{value:.{digits}g}")


def check_tolerance(tolerance: float | None) -> None:
    """See that a tolerance from the command line, where one is given, is one.

    Raises:
        UserError: it is not.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UserError(f"--tolerance {tolerance}: give the largest difference to accept, such as 0.01")

"""`accel-trainer list`: the recipes in reach as a table."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

from accel_trainer.errors import UserError
from accel_trainer.library import VARIABLE, Entry, entries
from accel_trainer.recipe import Recipe
from accel_trainer.recipe_file import glance
from accel_trainer.results import checkpoint_named, dataset_named, score
from accel_trainer.terminal import Style, print_table, say

WIDEST = 40  # characters of a checkpoint or dataset in the table


@dataclass(frozen=True)
class Row:
    """A recipe in the table; a file with mistakes tells nothing but that it has some."""

    entry: Entry
    problem_type: str = ""
    checkpoint: str = ""
    dataset: str = ""
    recorded: str = ""
    is_sound: bool = False

    @property
    def result(self) -> str:
        """The newest result, or where the recipe's mistakes are told."""
        return self.recorded if self.is_sound else f"has mistakes: accel-trainer check {self.entry.name}"


def print_recipes(pattern: str | None = None) -> None:
    """Print the recipes in reach, or those that match a pattern; columns that tell nothing are left out.

    Args:
        pattern: part of a recipe's name, checkpoint or dataset, or a glob for the whole of one; case does not matter.

    Raises:
        UserError: no recipe matches it.
    """
    found = rows(pattern)
    if not found and pattern is not None:
        raise UserError(f"no recipe's name, checkpoint or dataset matches {pattern!r}; `accel-trainer list` shows all")
    if not found:
        say(f"no recipes in reach: write one into ./recipes, or name a library in {VARIABLE}")
        return
    types = [row.problem_type for row in found]
    columns = {
        "name": [row.entry.name for row in found],
        "problem type": types if len(set(types) - {""}) > 1 else [],
        "checkpoint": [_end(row.checkpoint) for row in found],
        "dataset": [_end(row.dataset) for row in found],
        "recorded": [row.result for row in found],
        "from": [row.entry.origin for row in found],
        "shadows": [", ".join(row.entry.shadows) for row in found],
    }
    told = {header: cells for header, cells in columns.items() if any(cells)}
    styles: list[Style] = ["" if row.is_sound else "yellow" for row in found]
    print_table(list(told), zip(*told.values(), strict=True), whole=[0], styles=styles)


def rows(pattern: str | None = None) -> list[Row]:
    """The recipes in reach that match a pattern, by name."""
    with _without_notes():
        found = [_row(entry) for entry in entries()]
    return [row for row in found if _matches(pattern, row.entry.name, row.checkpoint, row.dataset)]


def _row(entry: Entry) -> Row:
    try:
        recipe, is_sound = glance(entry.path)
    except UserError:
        return Row(entry)
    named = checkpoint_named(recipe.model), dataset_named(recipe.dataset)
    return Row(entry, recipe.problem_type, *named, _recorded(recipe), is_sound)


def _recorded(recipe: Recipe) -> str:
    best = score(recipe)
    if best is None:
        return ""
    return f"{best.metric} {best.value:.4f}{'' if best.role == 'test' else f' on {best.role}'}"


def _end(text: str) -> str:
    """The end of a long address, which tells more than its beginning."""
    return text if len(text) <= WIDEST else f"…{text[1 - WIDEST :]}"


def _matches(pattern: str | None, *texts: str) -> bool:
    if pattern is None:
        return True
    wanted = pattern.lower()
    is_glob = any(sign in wanted for sign in "*?[")
    return any(fnmatchcase(text.lower(), wanted) if is_glob else wanted in text.lower() for text in texts)


@contextmanager
def _without_notes() -> Iterator[None]:
    """Leave out notes about old names in recipes: `check` tells them."""
    logger = logging.getLogger("accel_trainer")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)

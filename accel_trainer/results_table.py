"""The results of a library of recipes, as a Markdown table in the README.md beside them.

The table stands between two comments. Whoever wants one writes these into the README of a library; `accel-trainer record`
then keeps what is between them current.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from accel_trainer.errors import RecipeError, UserError
from accel_trainer.library import recipes_in
from accel_trainer.recipe import DatasetSection, ModelSection, Recipe, Result
from accel_trainer.recipe_check import checked
from accel_trainer.recipe_file import read_draft
from accel_trainer.respelling import respell
from accel_trainer.writing import replaced

BEGIN = "<!-- results: written by accel-trainer record; edits here are lost -->"
END = "<!-- end of results -->"
HEADERS = ("recipe", "description", "checkpoint", "dataset", "metric", "value", "hardware", "duration", "date")
NUMBERS = ("value", "duration")  # aligned to the right


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


def _linked(name: str) -> str:
    """A name for Markdown: an address under its last part."""
    return f"[{posixpath.basename(name.rstrip('/'))}]({name})" if "://" in name else name


def as_written(path: Path) -> Recipe:
    """The recipe in a file, with the files and folders that it names as they stand there, wherever these are.

    Raises:
        UserError: it has mistakes, or cannot be read.
    """
    try:
        draft = read_draft(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}; see that it is there and may be read"
        ) from error
    respell(draft)
    recipe = checked(draft)
    if draft.mistakes:
        raise RecipeError(draft.mistakes)
    return recipe


def results_table(folder: Path) -> str:
    """A Markdown table with a row for every recipe below a folder, by name; files that are no recipes are left out."""
    rows = []
    for name, path in recipes_in(folder).items():
        rows.append([f"[{name}]({path.relative_to(folder).as_posix()})", *_cells(path)])
    rule = ["---:" if header in NUMBERS else "---" for header in HEADERS]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (HEADERS, rule, *rows))


def _cells(path: Path) -> list[str]:
    """What stands in a recipe's row, behind its name."""
    try:
        recipe = as_written(path)
    except UserError:
        return ["has mistakes: see `accel-trainer check`", *[""] * (len(HEADERS) - 2)]
    head = [recipe.description, checkpoint_named(recipe.model), _linked(dataset_named(recipe.dataset))]
    result, best = newest(recipe.results), score(recipe)
    if result is None or best is None:
        tail = [chosen_metric(recipe), "not recorded", "", "", ""]
    else:
        duration = "" if result.duration is None else str(timedelta(seconds=round(result.duration)))
        tail = [f"{best.role} {best.metric}", f"{best.value:.4f}", result.hardware, duration, result.date]
    return [" ".join(cell.split()).replace("|", "\\|") for cell in [*head, *tail]]


def write_table(folder: Path) -> None:
    """Write the table of a library anew into its README.md, which must have a place for one.

    Raises:
        UserError: it cannot be written.
    """
    readme = folder / "README.md"
    text = _with_place(readme)
    assert text is not None
    before, _, rest = text.partition(BEGIN)
    table = f"{BEGIN}\n\n{results_table(folder)}\n{END}"
    try:
        with replaced(readme) as writing:
            writing.write_bytes((before + table + rest.partition(END)[2]).encode())
    except OSError as error:
        raise UserError(f"cannot write {readme}: {error.strerror or error}; see to its permissions") from error


def library_of(recipe: Path) -> Path | None:
    """The nearest folder around a recipe whose README.md has a place for the table, in the same checkout; else None."""
    for folder in recipe.absolute().parents:
        if _with_place(folder / "README.md") is not None:
            return folder
        if (folder / ".git").exists():
            break
    return None


def _with_place(readme: Path) -> str | None:
    """The text of a README that has a place for the table; None for any other."""
    try:
        text = readme.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None
    return text if END in text.partition(BEGIN)[2] else None

"""The results of a library of recipes, as a Markdown table in the README.md beside them.

The table stands between two comments. Whoever wants one writes these into the README of a library; `accel-trainer record`
then keeps what is between them current.
"""

from __future__ import annotations

import posixpath
import re
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

from accel_trainer.errors import UserError
from accel_trainer.library import recipes_in
from accel_trainer.recipe_file import as_written
from accel_trainer.results import checkpoint_named, chosen_metric, dataset_named, newest, score
from accel_trainer.writing import replaced

BEGIN = "<!-- results: written by accel-trainer record; edits here are lost -->"
END = "<!-- end of results -->"
HEADERS = ("recipe", "description", "checkpoint", "dataset", "metric", "value", "hardware", "duration", "date")
NUMBERS = ("value", "duration")  # aligned to the right


def _plain(text: str) -> str:
    """Text for a cell, on one line, in which Markdown finds no cell, no HTML, and no end of the table."""
    return re.sub(r"([\\|])", r"\\\1", " ".join(text.split())).replace("<", "&lt;")


def _link(text: str, address: str) -> str:
    text = re.sub(r"([][])", r"\\\1", _plain(text))
    return f"[{text}]({address})"


def _linked(name: str) -> str:
    """A name for Markdown: an address under its last part."""
    if "://" not in name:
        return _plain(name)
    return _link(posixpath.basename(name.rstrip("/")), quote(name, safe="/:?#@!$&'*+,;=%~"))


def results_table(folder: Path) -> str:
    """A Markdown table with a row for every recipe below a folder, by name; files that are no recipes are left out."""
    rows = []
    for name, path in recipes_in(folder).items():
        rows.append([_link(name, quote(path.relative_to(folder).as_posix())), *_cells(path)])
    rule = ["---:" if header in NUMBERS else "---" for header in HEADERS]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (HEADERS, rule, *rows))


def _cells(path: Path) -> list[str]:
    """What stands in a recipe's row, behind its name."""
    try:
        recipe = as_written(path)
    except UserError:
        return ["has mistakes: see `accel-trainer check`", *[""] * (len(HEADERS) - 2)]
    head = [_plain(recipe.description), _plain(checkpoint_named(recipe.model)), _linked(dataset_named(recipe.dataset))]
    result, best = newest(recipe.results), score(recipe)
    if result is None or best is None:
        tail = [chosen_metric(recipe), "not recorded", "", "", ""]
    else:
        duration = "" if result.duration is None else str(timedelta(seconds=round(result.duration)))
        tail = [f"{best.role} {best.metric}", f"{best.value:.4f}", result.hardware, duration, result.date]
    return [*head, *map(_plain, tail)]


def write_table(folder: Path) -> None:
    """Write the table of a library anew into its README.md, which must have a place for one.

    Raises:
        UserError: it cannot be written.
    """
    readme = (folder / "README.md").resolve()  # a link stays one
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

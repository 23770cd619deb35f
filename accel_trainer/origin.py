"""Where the recipe of a run stands, so that its result can be written back there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accel_trainer.library import find_recipe
from accel_trainer.writing import sha256


@dataclass(frozen=True)
class Origin:
    """A recipe as it was asked for."""

    name: str  # in the library it was found in, else the file's
    path: Path
    overrides: tuple[str, ...]
    sha256: str | None  # of the file's bytes; None if it cannot be read, which is told elsewhere

    def as_dict(self) -> dict[str, Any]:
        """The same for run.json."""
        return {**asdict(self), "path": str(self.path)}


def origin_of(recipe: str, overrides: Sequence[str] = ()) -> Origin:
    """Find a recipe by path or name.

    Raises:
        UserError: there is none.
    """
    name, path = find_recipe(recipe)
    digest = None
    with suppress(OSError):
        digest = sha256(path)
    return Origin(name, path.absolute(), tuple(overrides), digest)

"""Where the recipe of a run stands, so that its result can be written back there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accel_trainer.library import find_recipe


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
    sha256 = None
    with suppress(OSError):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Origin(name, path.absolute(), tuple(overrides), sha256)

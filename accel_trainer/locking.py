"""A recipe that names its bytes: commits of the Hub, and hashes of the checkpoint's files and of the rows of each role.

A locked recipe trains on these or not at all (`model_files`, `data`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accel_trainer.draft import ABSENT, Keys, dotted, look_up
from accel_trainer.errors import UserError
from accel_trainer.inputs import read_inputs
from accel_trainer.library import find_recipe
from accel_trainer.model_files import WEIGHTS
from accel_trainer.recipe import Recipe
from accel_trainer.recipe_edit import changing, edit
from accel_trainer.recipe_file import load_recipe, parse_recipe, read_overrides
from accel_trainer.tracking import logger, quieten_libraries

COMMIT = re.compile(r"[0-9a-f]{40}")
REVISIONS = [("model", "revision"), ("model", "tokenizer_revision"), ("dataset", "revision")]
LOCKS = [*REVISIONS, ("model", "sha256"), ("dataset", "sha256")]


def lock_recipe(recipe: str, overrides: Sequence[str] = (), *, trust_remote_code: bool = False) -> Path:
    """Read what a recipe names as a run would, and write into its file what that was: commits and hashes.

    A commit that stands there stays; hashes are taken anew.

    Args:
        recipe: path or name.
        overrides: revisions to lock to, such as `model.revision=main`.
        trust_remote_code: as for a run.

    Returns:
        the recipe's file.

    Raises:
        UserError: something cannot be read, or the file cannot be written.
    """
    quieten_libraries()
    _, path = find_recipe(recipe)
    given = read_overrides(overrides)
    for keys in given:
        if keys not in REVISIONS:
            raise UserError(
                f"lock: {dotted(keys)} would change the recipe; give revisions only ({', '.join(map(dotted, REVISIONS))}), or "
                "make a recipe with other values first: accel-trainer copy FROM TO section.key=value"
            )
    with changing(path) as change:  # before anything is read: it may take long, and be in vain
        asked = load_recipe(path, overrides)
        locked, changes = _locks(asked, trust_remote_code=trust_remote_code)
        for keys in given:
            if not COMMIT.fullmatch(str(changes[keys])):
                raise UserError(
                    f"lock: {dotted(keys)}: what is read has no revisions, being no repository; leave it out"
                )
        change.text = edit(change.text, changes)
        assert parse_recipe(change.text, str(path), base=path.parent) == locked
    before = asked.model_dump()
    for keys, value in changes.items():
        if value is not ABSENT:
            logger.info("%s: %s", dotted(keys), value if isinstance(value, str) else f"SHA-256 of {', '.join(value)}")
        held = look_up(before, keys)
        if isinstance(held, dict) and held != value:
            logger.warning(
                "%s: it was locked to other bytes before (%s)%s",
                dotted(keys),
                ", ".join(
                    sorted(name for name, sha256 in held.items() if value is ABSENT or value.get(name) != sha256)
                ),
                "; the recorded results are of those" if asked.results else "",
            )
    return path


def _locks(asked: Recipe, *, trust_remote_code: bool) -> tuple[Recipe, dict[Keys, Any]]:
    """A recipe with commits and hashes of what is read for it, and these as changes of its text."""
    locked = read_inputs(_without_hashes(asked), trust_remote_code=trust_remote_code).recipe
    if asked.model.checkpoint is not None and not any(map(WEIGHTS.fullmatch, locked.model.sha256 or {})):
        raise UserError(
            f"model.checkpoint: the weights of {asked.model.checkpoint!r} lie in no file of this revision that can be locked; "
            "save them with `save_pretrained` to a folder, and name that"
        )
    values, wanted = locked.model_dump(), asked.model_dump()
    changes: dict[Keys, Any] = {}
    for section, key in LOCKS:
        wanted[section][key] = values[section][key]
        changes[section, key] = ABSENT if values[section][key] is None else values[section][key]
    return Recipe.model_validate(wanted), changes


def _without_hashes(recipe: Recipe) -> Recipe:
    """The recipe before it was locked to any bytes: those found now take their place."""
    model, dataset = (section.model_copy(update={"sha256": None}) for section in (recipe.model, recipe.dataset))
    return recipe.model_copy(update={"model": model, "dataset": dataset})

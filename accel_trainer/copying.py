"""A new recipe from an old one: its text and comments, other values, and where it comes from."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accel_trainer.draft import ABSENT, Keys, dotted, look_up
from accel_trainer.errors import UserError
from accel_trainer.library import SUFFIXES, expanded, find_recipe, is_file, schema_address
from accel_trainer.recipe import Recipe
from accel_trainer.recipe_edit import edit, read_text, refuse_kept
from accel_trainer.recipe_file import load_recipe, parse_recipe, read_draft, read_overrides
from accel_trainer.respelling import respell
from accel_trainer.writing import created, sha256

_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")
_HEADER = re.compile(r"(?:[ \t]*(?:#[^\r\n]*)?\r?\n)*")
_IS_THERE = "{}: it is there already; choose another name, or remove it first"
_MODELINE = re.compile(r"(?m)^#\s*yaml-language-server:\s*\$schema=(\S+)")

# What says where files are; relative, it is relative to the recipe.
PATHS: list[Keys] = [("model", "checkpoint"), ("model", "tokenizer"), ("dataset", "path"), ("dataset", "data_files")]

# A commit or hash of a section → the keys of that section with which it belongs to something else.
OUTDATED_BY: dict[tuple[str, str], tuple[str, ...]] = {
    ("model", "revision"): ("checkpoint",),
    ("model", "tokenizer_revision"): ("tokenizer",),
    ("model", "sha256"): ("checkpoint", "revision", "from_config", "tokenizer", "tokenizer_revision", "train_tokenizer"),
    ("dataset", "revision"): ("path",),
    ("dataset", "sha256"): (
        *("path", "name", "revision", "data_files", "encoding", "shuffle_seed", "splits"),
        *("max_train_samples", "max_eval_samples", "max_predict_samples"),
        *("text_column", "text_pair_column", "label_column", "labels"),
    ),
}  # fmt: skip

logger = logging.getLogger("accel_trainer")


def copy_recipe(source: str, target: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Write a new recipe from an old one, with overrides in the place of its values.

    Text and comments stay. Recorded results are left out, and locks to what an override replaced. Files that the old one
    names beside it are named as seen from the new one: relative where both lie in the working directory, else absolute.

    Args:
        source: path or name of a recipe, or the folder of a run.
        target: path ending in .yaml, or a name: `team/x` is ./recipes/team/x.yaml.
        overrides: `section.key=value`.

    Returns:
        the new file.

    Raises:
        UserError: the old recipe or an override has mistakes, or the new file is there already or cannot be written.
    """
    name, path = _source(source)
    new = _target(str(target))
    wanted = load_recipe(path, overrides)
    text = read_text(path).removeprefix("\ufeff")
    origin = f"{name}@sha256:{sha256(path)[:12]}"
    changes = read_overrides(overrides)
    outdated = list(_outdated(wanted, changes))
    for keys in outdated:
        logger.info("%s is left out: it is not that of the new recipe (accel-trainer lock %s)", dotted(keys), target)
    changes |= dict.fromkeys(outdated, ABSENT)
    changes |= {("derived_from",): origin, ("results",): ABSENT}
    text = edit(text, changes)
    text = edit(text, _moved_paths(text, wanted, new.parent))
    try:
        new.parent.mkdir(parents=True, exist_ok=True)  # or ../data could not be followed
        text = _with_header(text, name, new)
        assert parse_recipe(text, str(new), base=new.parent) == _without(wanted, outdated, origin)
        with created(new) as writing:
            writing.write_bytes(text.encode())
    except OSError as error:
        if os.path.lexists(new):  # since it was looked for
            raise UserError(_IS_THERE.format(new)) from error
        raise UserError(f"cannot write {new}: {error.strerror or error}; choose another place") from error
    return new


def _source(source: str) -> tuple[str, Path]:
    of_run = expanded(source) / "recipe.yaml"
    return (Path(source).as_posix(), of_run) if is_file(of_run) else find_recipe(source)


def _target(target: str) -> Path:
    path = expanded(target)
    if path.parts[:1] and path.parts[0].startswith("~"):
        raise UserError(f"{target}: there is no home of {path.parts[0]}; choose another place")
    if path.suffix not in SUFFIXES:
        if not _NAME.fullmatch(target):
            raise UserError(
                f"{target}: this is no name for a recipe; give one such as team/{path.name or 'x'}, or a path ending in .yaml"
            )
        path = Path("recipes") / f"{target}.yaml"
    refuse_kept(path)
    if os.path.lexists(path):
        raise UserError(_IS_THERE.format(path))
    return path


def _outdated(wanted: Recipe, changes: Iterable[Keys]) -> Iterator[tuple[str, str]]:
    """Commits and hashes that overrides left behind."""
    changed, values = {keys[:2] for keys in changes}, wanted.model_dump()
    for (section, key), causes in OUTDATED_BY.items():
        is_other = any((section, cause) in changed for cause in causes)
        if is_other and (section, key) not in changed and values[section][key] is not None:
            yield section, key


def _without(recipe: Recipe, locks: Iterable[tuple[str, str]], origin: str) -> Recipe:
    """The recipe that the new text must be read as."""
    values: dict[str, Any] = {**recipe.model_dump(), "derived_from": origin, "results": []}
    for section, key in locks:
        values[section][key] = None
    return Recipe.model_validate(values)


def _moved_paths(text: str, resolved: Recipe, folder: Path) -> dict[Keys, Any]:
    """The files that the text names, as seen from another folder."""
    draft = read_draft(text, "recipe")
    respell(draft)
    absolute = resolved.model_dump()
    inside = (
        resolved.dataset.path is not None and Path(resolved.dataset.path).is_dir()
    )  # data_files are looked for there
    found = {
        keys: value for keys in PATHS if (value := draft.get(keys)) is not None and not (inside and keys == PATHS[-1])
    }
    moved = {keys: _moved(value, look_up(absolute, keys), folder.resolve()) for keys, value in found.items()}
    return {keys: value for keys, value in moved.items() if value != found[keys]}


def _moved(written: Any, resolved: Any, folder: Path) -> Any:
    """A value whose relative paths are relative to `folder`; `resolved` has them absolute."""
    if isinstance(written, dict):
        return {key: _moved(value, resolved[key], folder) for key, value in written.items()}
    if isinstance(written, list):
        return [_moved(value, absolute, folder) for value, absolute in zip(written, resolved, strict=True)]
    if written == resolved or written.startswith("~"):
        return written
    here = Path.cwd().resolve()
    if Path(resolved).is_relative_to(here) and folder.is_relative_to(here):
        return Path(os.path.relpath(resolved, folder)).as_posix()
    return resolved


def _with_header(text: str, name: str, new: Path) -> str:
    """The text with comments above its first key that name the new file, and the address of the schema for editors."""
    found = _HEADER.match(text)
    header = found[0] if found else ""
    body = text[len(header) :]
    here = Path.cwd().resolve()
    called = new.resolve().relative_to(here) if new.resolve().is_relative_to(here) else new.absolute()
    old = re.escape(name)
    header = re.sub(rf"(?<![\w./~-])[\w./~-]*?\b{old}\.ya?ml(?![\w/-]|\.\w)", lambda _: called.as_posix(), header)
    header = re.sub(rf"(?<=accel_trainer\.train ){old}(?![\w./-])", lambda _: called.as_posix(), header)
    address = schema_address(new)
    modeline = _MODELINE.search(header)
    if modeline is None:
        newline = "\r\n" if "\r\n" in text else "\n"
        return f"# yaml-language-server: $schema={address}{newline}{header}{body}"
    if "://" in modeline[1]:
        return header + body
    return header[: modeline.start(1)] + address + header[modeline.end(1) :] + body

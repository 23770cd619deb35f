"""The files and folders that a recipe names: found and made absolute, or reported."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import islice, takewhile
from pathlib import Path
from typing import cast

from accel_trainer.draft import Draft, Keys, shown
from accel_trainer.file_names import extensions

_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)?")

MOST_ENTRIES = 10_000  # of a folder that are looked through for a name like another


def resolve_paths(draft: Draft, beside: Path | None, *, globs: bool = True) -> None:
    """Make the files and folders that the draft names absolute; report those that exist nowhere.

    With `globs=False` folders are not searched: a glob is taken to match something.
    """
    singles: list[Keys] = [("model", "checkpoint"), ("model", "tokenizer"), ("dataset", "path")]
    for keys in singles:
        value = draft.get(keys)
        if isinstance(value, str):
            hub = _HUB_ID.fullmatch(value) is not None and extensions(value)[0] is None
            _resolve(draft, keys, value, _search_places(draft, keys, beside), optional=hub)
    path, files = draft.get(("dataset", "path")), cast(Keys, ("dataset", "data_files"))
    if ("dataset", "path") in draft.faulty or (isinstance(path, str) and not Path(path).is_absolute()):
        return  # files of a Hub repository or of an address
    for keys, value in list(_texts(draft.get(files), files)):
        if not globs and glob.has_magic(value):
            continue
        inside = isinstance(path, str) and Path(path).is_dir()
        places = [Path(path)] if inside else _search_places(draft, keys, beside)
        _resolve(draft, keys, value, places, optional=False)


def _texts(value: object, keys: Keys) -> Iterator[tuple[Keys, str]]:
    if isinstance(value, str):
        yield keys, value
    elif isinstance(value, list | dict):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(below, (*keys, key))


def _search_places(draft: Draft, keys: Keys, beside: Path | None) -> list[Path]:
    places = [Path.cwd()] if beside is None else [beside.absolute(), Path.cwd()]
    return list(dict.fromkeys(reversed(places) if draft.spot(keys).override else places))


def _resolve(draft: Draft, keys: Keys, value: str, places: Sequence[Path], *, optional: bool) -> None:
    if "://" in value:
        return
    try:
        wanted = Path(value).expanduser()
    except RuntimeError:  # ~somebody without a home
        wanted = Path(value)
    for place in places if value else []:
        if found := _absolute(place, wanted, globs=keys[1] == "data_files"):
            draft.get(keys[:-1])[keys[-1]] = found
            return
    if not optional:
        looked = "it is absolute" if wanted.is_absolute() else f"looked in {' and '.join(map(str, places))}"
        near = next(filter(None, (similar_path(place, wanted) for place in places)), None)
        hint = f"did you mean {near}? " if near else ""
        if keys[1] == "data_files" and any(_is_search_of_the_disk(place / wanted) for place in places):
            hint = "** is searched for neither below / nor below a home folder: name the folder that holds the files; "
        draft.fault(keys, f"no such file or folder: '{shown(value)}'", f"{hint}{looked}")


def _absolute(place: Path, wanted: Path, *, globs: bool) -> str | None:
    """The absolute form of a path that exists, or of a glob that matches something; else None."""
    path = place / wanted
    if _exists(path):
        # A link keeps its own name: the Hub's cache stores content under names without a suffix.
        return str(path.resolve() if path.is_dir() else path.parent.resolve() / path.name)
    if not globs or not glob.has_magic(str(wanted)) or _is_search_of_the_disk(path):
        return None
    root = Path(path.anchor) if wanted.is_absolute() else place.resolve()
    pattern = wanted.relative_to(root) if wanted.is_absolute() else wanted
    while pattern.parts[:1] == ("..",):
        root, pattern = root.parent, Path(*pattern.parts[1:])
    try:
        matches = any(True for _ in root.glob(str(pattern)))
    except (OSError, ValueError):  # a folder that may not be read, a null byte, ** within a name
        return None
    return str(Path(glob.escape(str(root))) / pattern) if matches else None


def _is_search_of_the_disk(path: Path) -> bool:
    """Whether a glob means everything below `/`, or below somebody's home folder or one above it."""
    if "**" not in path.parts:
        return False
    fixed = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
    home = Path(os.path.realpath(os.path.expanduser("~")))  # noqa: PTH111 (Path's own raises where there is none)
    try:
        return Path(os.path.realpath(fixed)) in (Path(fixed.anchor), home, *home.parents)
    except ValueError:  # a null byte
        return False


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, a folder that may not be read, a null byte
        return False


def similar_path(place: Path, wanted: Path) -> Path | None:
    """What exists, seen from a folder, and differs from a path in few letters of its parts; None where nothing does."""
    found = Path(wanted.anchor)
    for part in wanted.relative_to(found).parts:
        if part != ".." and not _exists(place / found / part):
            try:
                names = [entry.name for entry in islice((place / found).iterdir(), MOST_ENTRIES)]
            except OSError:
                return None
            close = get_close_matches(part, names, 1, 0.7)
            if not close:
                return None
            part = close[0]
        found /= part
    return found


def similar_files(path: Path) -> str:
    """What to do about a recipe that is not there: the names nearest to it in its folder."""
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml"))
    except OSError:
        return f"there is no folder {path.parent} either"
    close = get_close_matches(path.name, names, 3, 0.5) or names[:5]
    return f"its folder has {', '.join(close)}" if close else f"{path.parent} has no .yaml file"

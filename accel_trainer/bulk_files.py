"""The files that are to be labelled, found by patterns, each with the name of what becomes of it."""

from __future__ import annotations

import glob
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from accel_trainer.errors import UserError
from accel_trainer.file_names import KNOWN, extensions, is_data_file


def find_inputs(patterns: Sequence[str], output: Path) -> dict[str, Path]:
    """The files that some patterns name, by the names of what becomes of them, in the order in which those are read.

    Args:
        patterns: paths, or patterns with `*`, `?`, `[…]` and `**`.
        output: the folder of what becomes of them.

    Raises:
        UserError: nothing is found, or what is found is no file; two files would have one name, or are one; or all that a
            pattern finds lies in the output folder.
    """
    found: dict[Path, Path] = {}  # as given, by where they lie
    for pattern in patterns:
        if "://" in pattern:
            raise UserError(f"--input {pattern}: only files of this machine are labelled by the folder; copy them here")
        literal = Path(os.path.expanduser(pattern))  # noqa: PTH111 (Path's own raises where there is no home)
        if literal.is_dir():
            raise UserError(
                f"--input {pattern}: this is a folder; name the files in it, such as '{literal / '*.parquet'}'"
            )
        paths = [literal] if literal.exists() or literal.is_symlink() else _matching(literal)
        paths = [path for path in paths if is_data_file(path.name) or not path.is_dir()]
        if not paths:
            raise UserError(
                f"--input {pattern}: there is no such file, seen from {Path.cwd()}; correct the path or pattern"
                + _bracket_advice(literal)
            )
        # What a pattern finds among the results of an earlier launch is no input, nor is a link to one.
        listed = [path for path in paths if not _lies_in(path, _real(output))]
        if not listed:
            raise UserError(
                f"--input {pattern}: {paths[0]} lies in --output {output}; name another folder for what is labelled"
            )
        for path in listed:
            found.setdefault(_place(path), path.absolute())
    folders = {place: path for place, path in found.items() if path.is_dir()}
    files = {place: path for place, path in found.items() if place not in folders}
    for path in folders.values():  # as Spark writes; a pattern with `**` finds the files in it too
        if not any(place.is_relative_to(_real(path)) for place in files):
            raise UserError(f"--input {path}: this is a folder; name the files in it: '{path / f'*{path.suffix}'}'")
    return _named(list(files.values()), output)


def _bracket_advice(pattern: Path) -> str:
    """What to write for a folder with a `[` in its name, if that is what a pattern means."""
    meant = next((folder for folder in pattern.parents if "[" in folder.name and folder.is_dir()), None)
    if meant is None:
        return ""
    return f"; the [ of a folder's name is written [[]: '{Path(glob.escape(str(meant))) / pattern.relative_to(meant)}'"


def _named(paths: Sequence[Path], output: Path) -> dict[str, Path]:
    one_file: dict[Path, Path] = {}
    for path in paths:
        _check_file(path)
        real = _real(path)
        other = one_file.setdefault(real, path)
        if other != path:
            raise UserError(
                f"--input {other} and {path}: both are links to {real}, or one is, so that its rows would be labelled twice; "
                "name one of them, or put a copy in its place"
            )
    named: dict[str, Path] = {}
    one_folder: dict[str, str] = {}  # names, by what a file system that tells few apart makes of them
    for path, name in zip(paths, _distinct_names(paths), strict=True):
        alike = one_folder.setdefault(_folded(name), name)
        if alike in named:
            same = "" if alike == name else f", which on some systems is {output / alike}"
            raise UserError(
                f"--input {named[alike]} and {path}: both would be labelled into {output / name}{same}; rename one of them, or "
                "label them into two folders"
            )
        named[name] = path
    # As readers of the output sort the paths in it, so that they find the rows in this order.
    return {name: named[name] for name in sorted(named, key=lambda name: f"{name}/")}


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """What becomes of the files is called as they are; if two would be called alike, as all are below their common folder."""
    names = [output_name(path) for path in paths]
    if max(Counter(map(_folded, names)).values()) == 1:
        return names
    places = list(map(_place, paths))
    common = os.path.commonpath([place.parent for place in places])
    # One level, as a pattern for all results has.
    return [output_name(Path("-".join(place.relative_to(common).parts))) for place in places]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _check_file(path: Path) -> None:
    if not is_data_file(path.name):
        raise UserError(
            f"--input {path}: its extension does not tell the format; narrow the pattern, or rename it: {KNOWN}"
        )
    if not path.exists():
        raise UserError(
            f"--input {path}: this is a link to nothing, {_real(path)}; fetch what it stands for (git annex get, dvc pull, …), "
            "or delete it"
        )
    if not path.is_file():
        raise UserError(f"--input {path}: this is neither a file nor a folder; narrow the pattern")
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        raise UserError(f"--input {path}: its name is not UTF-8; rename it, or the folder above it") from None


def _matching(pattern: Path) -> list[Path]:
    return [Path(path) for path in sorted(glob.glob(str(pattern), recursive=True))]  # noqa: PTH207, as Path's takes no absolute ones


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path's own raises where links lead round


def _place(path: Path) -> Path:
    """Where a path lies, whatever way leads there; a link, not what it leads to."""
    return _real(path.parent) / path.name


def _lies_in(path: Path, folder: Path) -> bool:
    return any(place.is_relative_to(folder) for place in (_place(path), _real(path)))


def output_name(path: Path) -> str:
    """What becomes of a file is called as the file is, without extensions, and so that no reader of folders leaves it out."""
    compression = extensions(path.name)[1]
    stem = path.name.removesuffix(path.suffix) if compression else path.name
    bare = Path(stem).stem if extensions(stem)[0] else stem
    # Hidden from pandas and `datasets`: "." and "_" at the beginning. A column to them: "=".
    return bare.lstrip("._").replace("=", "-") or "rows"

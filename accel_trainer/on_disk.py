"""What a recipe names on this machine, looked at from outside: folders that lack files, tables that lack columns.

Only what is certain is reported. Whether a file can be read to its end shows when the data are read.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import glob
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from accel_trainer.draft import Draft, Keys, shown
from accel_trainer.file_names import KNOWN, extensions, is_data_file
from accel_trainer.recipe import DatasetSection, Recipe
from accel_trainer.recipe_paths import similar_path
from accel_trainer.splits import parse_slices

MOST_FILES = 10_000  # of a folder that are looked through for one with data
HEAD = 1 << 16  # characters of a table that its header stands in

_OPENERS: dict[str | None, Callable[[Path], Any]] = {
    None: lambda path: path.open("rb"),
    "gz": gzip.open,
    "bz2": bz2.open,
    "xz": lzma.open,
}
_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
# One of each group makes a folder what it is named for.
_CONFIG = ("config.json",)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model"),
    *("sentencepiece.bpe.model", "spm.model"),
)


def report_files(recipe: Recipe, draft: Draft) -> None:
    """Note in the draft what is missing in the folders and tables that the recipe names."""
    _report_checkpoint(recipe, draft)
    for keys in (("model", "checkpoint"), ("model", "tokenizer"), ("dataset", "path")):
        _report_near_folder(draft, cast(Keys, keys))
    if recipe.dataset.path is not None and not _is_sound(draft, "dataset.path"):
        return
    folder = Path(recipe.dataset.path) if recipe.dataset.path and not recipe.dataset.data_files else None
    if folder is not None and folder.is_absolute() and folder.is_dir() and not _holds_data(folder):
        draft.fault(("dataset", "path"), f"the folder {folder} holds no data files", KNOWN)
    elif _is_sound(draft, "dataset.data_files"):
        _report_tables(recipe.dataset, draft)


def _is_sound(draft: Draft, dotted: str) -> bool:
    keys = tuple(dotted.split("."))
    return not any(faulty[: len(keys)] == keys for faulty in draft.faulty)


# --- models -----------------------------------------------------------------------------------------------------------


def _report_checkpoint(recipe: Recipe, draft: Draft) -> None:
    model = recipe.model
    if model.checkpoint and Path(model.checkpoint).is_absolute() and _is_sound(draft, "model.checkpoint"):
        folder, keys = Path(model.checkpoint), cast(Keys, ("model", "checkpoint"))
        inner = folder / "model"
        if not folder.is_dir():
            draft.fault(keys, "this is a file", "name the folder that holds config.json and the weights")
        elif not _has(folder, _CONFIG) and _has(inner, _CONFIG):
            draft.fault(keys, "this is the folder of a run", f"name its model: {inner}")
        else:
            lacking = [] if _has(folder, _CONFIG) else ["config.json"]
            if not _has(folder, _WEIGHTS):
                lacking.append("weights (model.safetensors; pickled ones are not read)")
            if model.tokenizer is None and not _has(folder, _TOKENIZER):
                lacking.append("a tokenizer (tokenizer.json)")
            if lacking:
                remedy = "save model and tokenizer there with save_pretrained, or name another folder"
                draft.fault(keys, f"the folder lacks {', '.join(lacking)}", remedy)
    named = Path(model.tokenizer or "")
    if named.is_absolute() and not _has(named, _TOKENIZER):
        what = "the folder lacks a tokenizer (tokenizer.json)"
        draft.fault(("model", "tokenizer"), what, "save it there with save_pretrained, or name another folder")


def _has(folder: Path, one_of: Sequence[str]) -> bool:
    return any((folder / name).is_file() for name in one_of)


def _report_near_folder(draft: Draft, keys: Keys) -> None:
    """Report a Hub id that was meant as a path: its owner is a folder here, with an entry whose name is much like it."""
    value, spot = draft.get(keys), draft.spot(keys)
    if keys in draft.faulty or not isinstance(value, str) or "/" not in value or Path(value).is_absolute():
        return
    for place in dict.fromkeys([Path(spot.source).parent, Path.cwd()]):
        if (place / value).parent.is_dir() and (near := similar_path(place, Path(value))):
            what = f"there is no folder '{shown(value)}' here, so that the Hub would be asked for it"
            draft.fault(keys, what, f"did you mean {near}? If not, rename the folder {place / Path(value).parts[0]}")
            return


# --- data -------------------------------------------------------------------------------------------------------------


def _holds_data(folder: Path) -> bool:
    """Whether the folder holds data files, or is a dataset saved whole; a folder too large to be looked through does."""
    if _has(folder, ("state.json", "dataset_dict.json")):
        return True
    names = (name for _, folders, files in os.walk(folder) for name in (*files, *folders))
    return any(is_data_file(name) or i >= MOST_FILES for i, name in enumerate(names))


def _report_tables(section: DatasetSection, draft: Draft) -> None:
    """Report splits that no file stands for, and columns that a table's header does not have."""
    files = _files_by_split(section)
    if files is None:
        return
    roles = section.splits.roles().items()
    for role, expression in ((role, source) for role, source in roles if _is_sound(draft, f"dataset.splits.{role}")):
        pieces = [piece.name for piece in parse_slices(expression)] if isinstance(expression, str) else [*files]
        for name in dict.fromkeys(pieces):
            if name not in files:
                near = get_close_matches(name, files, 1)
                hint = f"did you mean {near[0]}? " if near else ""
                remedy = f"{hint}the files are the split{'s' if len(files) > 1 else ''} {', '.join(files)}"
                draft.fault(("dataset", "splits", role), f"no file stands for the split '{shown(name)}'", remedy)
                continue
            for file in files[name]:
                _report_columns(section, draft, role, file)


def _files_by_split(section: DatasetSection) -> dict[str, list[Path]] | None:
    """Local files by split; None where they are elsewhere, or their names decide."""
    if section.path is not None and not Path(section.path).is_absolute():
        return None
    if section.data_files is not None:
        by_split = section.data_files if isinstance(section.data_files, dict) else {"train": section.data_files}
        return {split: list(_local(listed)) for split, listed in by_split.items()}
    path = Path(section.path or "")
    return {"train": [path]} if path.is_file() else None


def _local(patterns: str | list[str]) -> Iterator[Path]:
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if Path(pattern).is_file():
            yield Path(pattern)
        elif glob.has_magic(pattern) and "://" not in pattern:
            root = Path(pattern).anchor
            yield from islice(Path(root).glob(str(Path(pattern).relative_to(root))), MOST_FILES)


def _report_columns(section: DatasetSection, draft: Draft, role: str, file: Path) -> None:
    columns = _header(file, section.encoding)
    if not columns:
        return
    wanted = {"text_column": section.text_column, "text_pair_column": section.text_pair_column}
    if role != "test":  # which may have no labels
        wanted["label_column"] = section.label_column
    for key, column in wanted.items():
        if column is None or column in columns or not _is_sound(draft, f"dataset.{key}"):
            continue
        near = get_close_matches(column, columns, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        what = f"{file} has no column '{shown(column)}'"
        draft.fault(("dataset", key), what, f"{hint}it has {', '.join(map(shown, columns))}")


def _header(file: Path, encoding: str | None) -> list[str] | None:
    """The column names in the first line of a CSV or TSV file; None where they cannot be told from it alone."""
    format, compression = extensions(file.name)
    if format not in ("csv", "tsv") or compression not in _OPENERS:
        return None
    try:
        with _OPENERS[compression](file) as stream:
            text = _head(stream, encoding)
        rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if format == "tsv" else ",", strict=True)
        return next((row for row in rows if row), None)
    except (*_UNREADABLE, ValueError, LookupError, csv.Error):  # which reading the data tells with its line
        return None


def _head(stream: BinaryIO, encoding: str | None) -> str:
    """The whole lines at the beginning of a text, as all of it would be decoded.

    Raises:
        ValueError: they are no text in the encoding, UTF-8 if none is given: what they are shows when all of the data is read.
        LookupError: there is no such encoding.
    """
    if encoding is None or codecs.lookup(encoding).name == "utf-8":
        encoding = "utf-8-sig"
    text = io.TextIOWrapper(stream, encoding=encoding, newline="").read(HEAD)
    if "\0" in text:  # UTF-16, perhaps
        raise ValueError
    return text if len(text) < HEAD else text[: text.rfind("\n") + 1]

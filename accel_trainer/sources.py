"""From what a recipe's `dataset` section names to raw tables, one per source split.

    read_source ─┬─ files ────────────▶ read_files ─────┐
                 ├─ save_to_disk ─────▶ load_from_disk ─┼─▶ Source
                 └─ configs, Hub id ──▶ load_dataset ───┘

Roles, labels and tokens are the next module's job.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import datasets
from datasets.data_files import get_data_patterns, resolve_pattern

from accel_trainer.data_file import DAMAGE
from accel_trainer.errors import DataError
from accel_trainer.file_names import KNOWN, extensions, is_data_file, redacted
from accel_trainer.hub_data import has_configs, hub_id, read_configs, read_hub
from accel_trainer.recipe import DatasetSection
from accel_trainer.tables import Origin, Table, chosen_splits, quiet, read_files

__all__ = ["Source", "Table", "read_files", "read_source"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """What `dataset.path` and `dataset.data_files` name."""

    tables: dict[str, Table]  # by source split
    revision: str | None  # commit of a Hub dataset, where it is known


def read_source(dataset: DatasetSection, only: Collection[str] | None = None) -> Source:
    """Every source split that the section names, or the splits in `only`.

    A file, or several without a split name, are the split `train`. A relative path is a file or folder where there is
    one, else a Hub id. Where the Hub is not reached, its cache on this machine answers. Hub datasets and folders whose
    README.md has `configs` are read by `load_dataset`, with the types it gives; all other files by `read_files`.

    Raises:
        DataError: something named does not exist, cannot be reached or cannot be read, or a split of `only` is not
            there. The message names the file, where possible the row or line, and the remedy.
    """
    path = None if dataset.path is None else _home(dataset.path)
    if path is not None and (on_hub := hub_id(path)) is not None:
        repository, revision = on_hub
        return Source(*read_hub(repository, dataset, dataset.revision or revision, only))
    if dataset.data_files is not None:
        files = _named_files(path, dataset.data_files)
        return Source(_read_splits(files, path or "dataset.data_files", dataset.encoding, only), None)
    assert path is not None  # the recipe's rules
    if Path(path).is_dir():
        return Source(_read_folder(Path(path), dataset, only), None)
    files = _files_by_split(path) if "://" in path and extensions(path)[0] is None else {"train": [path]}
    return Source(_read_splits(files, path, dataset.encoding, only), None)


def _read_splits(
    files: dict[str, list[str]], place: str, encoding: str | None, only: Collection[str] | None
) -> dict[str, Table]:
    return {split: read_files(files[split], encoding) for split in chosen_splits(files, place, only)}


def _named_files(base: str | None, data_files: str | list[str] | dict[str, str | list[str]]) -> dict[str, list[str]]:
    if base is not None and "://" not in base and not Path(base).is_dir():
        raise DataError(
            f"{base}: there is no such folder; dataset.data_files are sought in it, or from here without it"
        )
    by_split = data_files if isinstance(data_files, dict) else {"train": data_files}
    files: dict[str, list[str]] = {}
    for split, patterns in by_split.items():
        listed = [patterns] if isinstance(patterns, str) else patterns
        found = chain.from_iterable(_matching(pattern, base) for pattern in listed)
        # Once each: patterns may overlap.
        files[split] = list({file if "://" in file else str(Path(file).absolute()): file for file in found}.values())
    return files


def _home(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser())


def _matching(pattern: str, base: str | None) -> list[str]:
    if "://" not in pattern:
        pattern = _home(pattern)
        if base is not None and "://" in base:
            pattern = f"{base.rstrip('/')}/{pattern}"
        elif base is not None:
            literal = Path(base, pattern)
            pattern = str(Path(glob.escape(base), pattern))
            if literal.exists():
                return [str(literal)]
        elif Path(pattern).exists():
            return [pattern]
    if not glob.has_magic(re.split(r"[?#]", pattern)[0] if "://" in pattern else pattern):
        return [pattern]
    try:
        with quiet():
            found = resolve_pattern(pattern, os.curdir)
    except Exception as error:  # each fsspec protocol has errors of its own
        raise DataError(
            f"{redacted(pattern)}: no file is found ({redacted(str(error))}); correct the path or the pattern"
        ) from None
    return sorted(file for file in found if isinstance(file, str))


def _read_folder(folder: Path, dataset: DatasetSection, only: Collection[str] | None) -> dict[str, Table]:
    if (folder / "state.json").is_file():
        return {split: _saved(folder) for split in chosen_splits(["train"], str(folder), only)}
    if (folder / "dataset_dict.json").is_file():
        try:
            splits = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{folder / 'dataset_dict.json'}: it cannot be read ({error}); save it again") from error
        return {split: _saved(folder / split) for split in chosen_splits(splits, str(folder), only)}
    if dataset.name is not None or has_configs(folder / "README.md"):
        return read_configs(folder, dataset.name, only)
    return _read_splits(_files_by_split(str(folder)), str(folder), dataset.encoding, only)


def _saved(folder: Path) -> Table:
    try:
        with quiet():
            data = datasets.load_from_disk(str(folder)).with_format(None)  # a saved format would turn text into tensors
    except (*DAMAGE, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{folder}: the saved dataset is damaged ({error}); save it again by save_to_disk") from error
    return Table(data, (Origin(str(folder), len(data)),))


def _files_by_split(folder: str) -> dict[str, list[str]]:
    """Data files by the split their names tell, as `datasets` decides; those whose names tell none are `train`.

    `datasets` alone drops those: `reviews.csv` beside `test.csv` would be no split at all.
    """
    base = folder if "://" in folder else glob.escape(str(Path(folder).absolute()))
    try:
        with quiet():
            every = _data_files(["**"], base)
            groups = get_data_patterns(base) if every else {}
            named = {str(split): _data_files(patterns, base) for split, patterns in groups.items()}
    except Exception as error:  # each fsspec protocol has errors of its own
        raise DataError(
            f"{redacted(folder)}: the folder cannot be listed ({redacted(str(error))}); check the path"
        ) from None
    files = {split: found for split, found in named.items() if found}
    splits_of = {file: [split for split in files if file in files[split]] for file in every}
    for file, splits in splits_of.items():
        if len(splits) > 1:
            raise DataError(
                f"{redacted(file)}: its name tells of the splits {' and '.join(splits)}; name the files of each split in "
                "`dataset.data_files`"
            )
    strays = [file for file, splits in splits_of.items() if not splits]
    if strays and "train" in files:
        logger.warning(
            "%s: left out, since other files are named train: %s", redacted(folder), redacted(", ".join(strays))
        )
    elif strays:
        files = {"train": strays, **files}
    if not files:
        raise DataError(f"{redacted(folder)}: the folder holds no data files; {KNOWN}")
    return files


def _data_files(patterns: list[str], base: str) -> list[str]:
    found: set[str] = set()
    for pattern in patterns:
        try:
            found.update(map(str, resolve_pattern(pattern, base)))
        except FileNotFoundError:
            continue  # a split has many patterns, few of which match
    return sorted(filter(is_data_file, found))

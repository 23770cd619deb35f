"""Data files to one table, memory-mapped from Arrow files that are prepared once.

    files ─▶ file_pieces ─▶ one Arrow file per data file ─▶ Table

Each Arrow file is named after the hash of the content, so a changed file is never answered from the cache.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import fsspec
import huggingface_hub
import pyarrow as pa

from accel_trainer.data_file import DAMAGE, DataFile, file_pieces, zip_member
from accel_trainer.errors import DataError
from accel_trainer.file_names import KNOWN, TEXT_FORMATS, extensions, redacted

READER = 2  # goes into the key of prepared files: raise it when the same bytes shall give other rows or be refused


@dataclass(frozen=True)
class Origin:
    """Where a contiguous run of rows of a table came from."""

    name: str  # file path, or "stanfordnlp/imdb train"; never with a password or token
    rows: int


@dataclass(frozen=True)
class Table:
    """Rows, memory-mapped, and where they came from."""

    data: datasets.Dataset
    origins: tuple[Origin, ...]  # in row order; their rows add up to len(data)

    def place(self, row: int) -> str:
        """Where a row is found, as in `reviews.csv, row 17`.

        Rows are counted from 1 within their file, as people count: the header and blank lines are no rows, and a cell of
        three lines is in one.
        """
        assert 0 <= row < len(self.data), row
        for origin in self.origins:
            if row < origin.rows:
                return f"{origin.name}, row {row + 1}"
            row -= origin.rows
        raise AssertionError("the origins name fewer rows than the table has")


def read_files(files: Sequence[str | Path], encoding: str | None = None) -> Table:
    """The rows of all files, in order.

    Args:
        files: paths or addresses; format and compression follow from the extensions.
        encoding: of CSV, TSV, JSON and text files; None: utf-8 with or without BOM, else gb18030.

    Cells of CSV and TSV files stay text as written; a missing trailing cell is null. JSON values keep their types,
    Parquet and Arrow files their types and `datasets` features.

    Raises:
        DataError: a file cannot be read, is broken or has no rows, or the columns of two files differ.
    """
    if not files:
        raise DataError("no data files are named; name at least one")
    names = [redacted(str(file)) for file in files]
    parts = _with_common_types(names, [_read_file(str(file), encoding) for file in files])
    origins = tuple(Origin(name, len(part)) for name, part in zip(names, parts, strict=True))
    return Table(parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts), origins)


def chosen_splits(splits: Iterable[str], place: str, only: Collection[str] | None) -> list[str]:
    """Those of the splits that are in `only`, or all.

    Raises:
        DataError: one of `only` is not there; `place` says where.
    """
    splits = list(splits)
    missing = [] if only is None else [split for split in only if split not in splits]
    if missing:
        raise DataError(
            f"{redacted(place)}: there is no split {missing[0]!r}, only {', '.join(splits)}; correct `dataset.splits`, "
            "or name the files of each split in `dataset.data_files`"
        )
    return [split for split in splits if only is None or split in only]


@contextmanager
def quiet() -> Iterator[None]:
    """Run without progress bars and log lines of `datasets` and the Hub client, whose settings are put back."""
    bars: list[Any] = [datasets, huggingface_hub.utils]
    shown = [library for library in bars if not library.are_progress_bars_disabled()]
    loggers: list[Any] = [datasets.logging, huggingface_hub.logging]
    verbosities = [library.get_verbosity() for library in loggers]
    for library in shown:
        library.disable_progress_bars()
    for library in loggers:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, verbosity in zip(loggers, verbosities, strict=True):
            library.set_verbosity(verbosity)
        for library in shown:
            library.enable_progress_bars()


# --- one file ---------------------------------------------------------------------------------------------------------


def _read_file(address: str, encoding: str | None) -> datasets.Dataset:
    file = _located(address)
    with _reading(file.name, file.format, file.compression):
        prepared = _prepared(file, encoding if file.format in TEXT_FORMATS.values() else None)
    return open_prepared(prepared, file.name)


def open_prepared(prepared: Path, name: str) -> datasets.Dataset:
    """The rows of a prepared file, by the name of what it was made from.

    Raises:
        DataError: it is damaged, or holds what `datasets` does not know.
    """
    try:
        return datasets.Dataset.from_file(str(prepared))
    except pa.ArrowInvalid as error:
        raise DataError(f"{prepared}: this prepared copy of {name} is damaged ({error}); delete it") from error
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise DataError(
            f"{name}: a column has a type that `datasets` cannot hold ({error}); save it as text, numbers or lists"
        ) from error


def _located(address: str) -> DataFile:
    name = redacted(address)
    if "://" not in address and not Path(address).exists():
        raise DataError(f"{name}: there is no such file; correct the path, seen from {Path.cwd()}")
    if "://" not in address and Path(address).is_dir():
        raise DataError(f"{name}: this is a folder where a file is needed; name the files in it")
    format, compression = extensions(address)
    if format is None and compression != "zip":
        raise DataError(f"{name}: the extension does not tell the format; rename the file, {KNOWN}")
    path = _fetched(address) if "://" in address else Path(address)
    if format is None:
        with _reading(name, compression):
            format = extensions(zip_member(name, path))[0]
        if format is None:
            raise DataError(f"{name}: the extension of the file inside does not tell its format; {KNOWN}")
    return DataFile(name, path, format, compression)


def _fetched(address: str) -> Path:
    try:
        with quiet():
            # Without an ETag `datasets` would answer from its downloads by address alone, however old.
            info = {} if address.startswith("hf://") else fsspec.core.url_to_fs(address)[0].info(address)
            keyed = address.startswith("hf://") or not info.keys().isdisjoint({"ETag", "etag"})
            config = datasets.DownloadConfig(force_download=not keyed, disable_tqdm=True)
            return Path(datasets.DownloadManager(download_config=config).download(address))
    except Exception as error:  # each fsspec protocol has errors of its own
        raise DataError(
            f"{redacted(address)}: it cannot be fetched ({type(error).__name__}: {redacted(str(error))}); "
            "check the address, the network and your rights, or copy the file here"
        ) from None  # the cause may spell out a password


@contextmanager
def _reading(name: str, *kind: str | None) -> Iterator[None]:
    """Turns what the operating system and the decoders raise into a DataError that names the file."""
    try:
        yield
    except PermissionError as error:
        raise DataError(f"{error.filename or name}: permission is denied; give yourself the right to it") from error
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:  # not the decoders', such as a full disk
            raise DataError(
                f"{name}: it cannot be read into the cache {datasets.config.HF_DATASETS_CACHE} ({error}); "
                "make room there, or set HF_HOME to a folder on another disk"
            ) from error
        raise damaged(name, " ".join(filter(None, kind)), error) from error


def damaged(name: object, kind: str, error: Exception) -> DataError:
    """What to say of a file that a decoder refused."""
    return DataError(
        f"{name}: the file is damaged, cut off, or no {kind} file as its name says ({error}); write it again, or rename it "
        "after its real format"
    )


def prepared_folder() -> Path:
    """Where prepared files lie."""
    return Path(datasets.config.HF_DATASETS_CACHE, "accel_trainer")


def _prepared(file: DataFile, encoding: str | None) -> Path:
    """The file's rows as an Arrow file in the cache of `datasets`, written if it is not there.

    Processes that write the same file at once each write their own and rename it: the last one wins, with equal rows.
    """
    with file.path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    digest.update(f"\0{READER}\0{file.format}\0{file.compression}\0{encoding}".encode())
    folder = prepared_folder()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{digest.hexdigest()}.arrow"
    if target.exists():
        return target
    incomplete = target.with_suffix(f".{uuid.uuid4().hex}.incomplete")
    try:
        pieces = file_pieces(file, encoding, folder)
        first = next(pieces)
        with pa.OSFile(str(incomplete), "wb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
            for piece in chain([first], pieces):
                writer.write_table(piece)
        incomplete.replace(target)
    finally:
        incomplete.unlink(missing_ok=True)
    return target


# --- several files ----------------------------------------------------------------------------------------------------


def _with_common_types(names: list[str], parts: list[datasets.Dataset]) -> list[datasets.Dataset]:
    """The parts with columns in one order and of one type, so that an all-null column goes with one of text."""
    common = parts[0].features.copy()
    for name, part in zip(names, parts, strict=True):
        own = part.features  # a deep copy, whenever it is asked for
        differing = sorted(common.keys() ^ own.keys())
        if not differing:
            wider = {column: _wider(common[column], own[column]) for column in common}
            differing = [column for column, feature in wider.items() if feature is None]
            common = datasets.Features({**common, **{c: f for c, f in wider.items() if f is not None}})
        if differing:
            raise DataError(
                f"{names[0]} and {name}: the columns {', '.join(map(repr, differing))} differ in name or type; "
                "give all files of a split the same columns, or name each under a split of its own in dataset.data_files"
            )
    aligned = [part.select_columns(list(common)) for part in parts]
    with quiet():
        return [part if part.features == common else part.cast(common) for part in aligned]


def _wider(one: Any, other: Any) -> Any:
    """The feature that holds the values of both; None if there is none."""
    if one == other:
        return one
    if not all(isinstance(feature, datasets.Value) for feature in (one, other)):
        return None
    schemas = [datasets.Features(column=feature).arrow_schema.remove_metadata() for feature in (one, other)]
    try:
        return datasets.Features.from_arrow_schema(pa.unify_schemas(schemas, promote_options="permissive"))["column"]
    except pa.ArrowException:
        return None

"""From what a recipe's `dataset` section names to raw tables, one per source split.

    read_source ─┬─ files ────────────▶ read_files ─ one Arrow file per data file ─┐
                 ├─ save_to_disk ─────▶ load_from_disk ────────────────────────────┼─▶ Source
                 └─ configs, Hub id ──▶ load_dataset ──────────────────────────────┘

Files are read here and not by `load_dataset`, because what a cell says must not depend on its neighbours: pandas turns
`NA` into null and `007` into 7, Arrow's JSON reader turns dates in texts into timestamps, and neither says in which line
a file is broken. Each file becomes an Arrow file named after the hash of its content, so a changed file is never answered
from the cache. Roles, labels and tokens are the next module's job.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import glob
import gzip
import hashlib
import io
import json
import logging
import lzma
import os
import re
import shutil
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import datasets
import fsspec
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets.data_files import get_data_patterns, resolve_pattern
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from accel_trainer.errors import DataError
from accel_trainer.recipe import DatasetSection

logger = logging.getLogger(__name__)

READER = 1  # goes into the key of prepared files: raise it when the same bytes shall give other rows
ROWS_AT_ONCE = 1000  # what `datasets` writes per record batch; its row lookup is made for it
LONGEST_CELL = 2**31 - 1  # bytes that one value of an Arrow string column can hold

TEXT_FORMATS = {"csv": "csv", "tsv": "tsv", "json": "json", "jsonl": "jsonl", "ndjson": "jsonl", "txt": "txt"}
FORMATS = TEXT_FORMATS | {"parquet": "parquet", "arrow": "arrow"}  # by file name extension
COMPRESSIONS = ("gz", "bz2", "zip", "zst", "xz")
KNOWN = (
    f"known are {', '.join('.' + name for name in FORMATS)}, each also with {', '.join('.' + c for c in COMPRESSIONS)}"
)

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})")
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError, pa.ArrowException)
_T = TypeVar("_T")


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

        Rows are counted from 0 within their file, header and blank lines left out, as `datasets` and pandas count.
        """
        assert 0 <= row < len(self.data), row
        for origin in self.origins:
            if row < origin.rows:
                return f"{origin.name}, row {row}"
            row -= origin.rows
        raise AssertionError("the origins name fewer rows than the table has")


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
    if path is not None and (hub_id := _hub_id(path)) is not None:
        return _read_hub(hub_id[0], dataset, dataset.revision or hub_id[1], only)
    if dataset.data_files is not None:
        files = _named_files(path, dataset.data_files)
        return Source(_read_splits(files, path or "dataset.data_files", dataset.encoding, only), None)
    assert path is not None  # the recipe's rules
    if Path(path).is_dir():
        return Source(_read_folder(Path(path), dataset, only), None)
    if "://" in path and _extensions(path)[0] is None:
        return Source(_read_splits(_files_by_split(path), path, dataset.encoding, only), None)
    return Source(_read_splits({"train": [path]}, path, dataset.encoding, only), None)


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
    names = [_redacted(str(file)) for file in files]
    parts = _with_common_types(names, [_read_file(str(file), encoding) for file in files])
    origins = tuple(Origin(name, len(part)) for name, part in zip(names, parts, strict=True))
    return Table(parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts), origins)


# One file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    name: str  # for people
    path: Path  # on this machine
    format: str  # a value of FORMATS
    compression: str | None  # one of COMPRESSIONS


def _read_file(address: str, encoding: str | None) -> datasets.Dataset:
    file = _located(address)
    with _reading(file):
        prepared = _prepared(file, encoding if file.format in TEXT_FORMATS.values() else None)
    try:
        return datasets.Dataset.from_file(str(prepared))
    except pa.ArrowInvalid as error:
        raise DataError(f"{prepared}: this prepared copy of {file.name} is damaged ({error}); delete it") from error
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise DataError(
            f"{file.name}: a column has a type that `datasets` cannot hold ({error}); save it as text, numbers or lists"
        ) from error


def _located(address: str) -> _File:
    name = _redacted(address)
    if "://" not in address and not Path(address).exists():
        raise DataError(f"{name}: there is no such file; correct the path, seen from {Path.cwd()}")
    if "://" not in address and Path(address).is_dir():
        raise DataError(f"{name}: this is a folder where a file is needed; name the files in it")
    format, compression = _extensions(address)
    if format is None and compression != "zip":
        raise DataError(f"{name}: the extension does not tell the format; rename the file, {KNOWN}")
    path = _fetched(address) if "://" in address else Path(address)
    if format is None:
        with _reading(_File(name, path, "", compression)):
            format = _extensions(_zip_member(name, path))[0]
        if format is None:
            raise DataError(f"{name}: the extension of the file inside does not tell its format; {KNOWN}")
    return _File(name, path, format, compression)


def _extensions(address: str) -> tuple[str | None, str | None]:
    """Format and compression, as the extensions tell."""
    if "://" in address:
        address = re.split(r"[?#]", address)[0]
    stem, *extensions = Path(address).name.lower().split(".")
    compression = extensions.pop() if extensions and extensions[-1] in COMPRESSIONS else None
    return (FORMATS.get(extensions[-1]) if stem and extensions else None), compression


def _fetched(address: str) -> Path:
    try:
        with _quiet():
            # Without an ETag `datasets` would answer from its downloads by address alone, however old.
            info = {} if address.startswith("hf://") else fsspec.core.url_to_fs(address)[0].info(address)
            keyed = address.startswith("hf://") or not info.keys().isdisjoint({"ETag", "etag"})
            config = datasets.DownloadConfig(force_download=not keyed, disable_tqdm=True)
            return Path(datasets.DownloadManager(download_config=config).download(address))
    except Exception as error:  # each fsspec protocol has errors of its own
        raise DataError(
            f"{_redacted(address)}: it cannot be fetched ({type(error).__name__}: {_redacted(str(error))}); "
            "check the address, the network and your rights, or copy the file here"
        ) from None  # the cause may spell out a password


@contextmanager
def _reading(file: _File) -> Iterator[None]:
    """Turns what the operating system and the decoders raise into a DataError that names the file."""
    try:
        yield
    except PermissionError as error:
        raise DataError(
            f"{error.filename or file.name}: permission is denied; give yourself the right to it"
        ) from error
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:  # not the decoders', such as a full disk
            raise DataError(
                f"{file.name}: it cannot be read into the cache {datasets.config.HF_DATASETS_CACHE} ({error}); "
                "make room there, or set HF_HOME to a folder on another disk"
            ) from error
        kind = " ".join(filter(None, (file.format, file.compression)))
        raise DataError(
            f"{file.name}: the file is damaged, cut off, or no {kind} file as its name says ({error}); "
            "write it again, or rename it after its real format"
        ) from error


def _zip_member(name: str, path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        members = [
            entry for entry in archive.namelist() if not entry.endswith("/") and not entry.startswith("__MACOSX")
        ]
        if len(members) != 1:
            raise DataError(f"{name}: the archive holds {len(members)} files; unpack it and name the files")
        if archive.getinfo(members[0]).flag_bits & 1:
            raise DataError(f"{name}: the archive is protected by a password; unpack it")
    return members[0]


_OPENERS: dict[str | None, Any] = {
    None: partial(Path.open, mode="rb"),
    "gz": gzip.open,
    "bz2": bz2.open,
    "xz": lzma.open,
    # Not zstandard's reader: it stops silently after the first of several frames, and where a file was cut off.
    "zst": lambda path: io.BufferedReader(pa.CompressedInputStream(str(path), "zstd")),
}


@contextmanager
def _opened(file: _File) -> Iterator[BinaryIO]:
    """The bytes of the file, decompressed."""
    if file.compression == "zip":
        member = _zip_member(file.name, file.path)
        with zipfile.ZipFile(file.path) as archive, archive.open(member) as stream:
            yield cast(BinaryIO, stream)
        return
    with _OPENERS[file.compression](file.path) as stream:
        yield stream


def _cache() -> Path:
    folder = Path(datasets.config.HF_DATASETS_CACHE, "accel_trainer")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _prepared(file: _File, encoding: str | None) -> Path:
    """The file's rows as an Arrow file in the cache of `datasets`, written if it is not there.

    Processes that write the same file at once each write their own and rename it: the last one wins, with equal rows.
    """
    with file.path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    digest.update(f"\0{READER}\0{file.format}\0{file.compression}\0{encoding}".encode())
    target = _cache() / f"{digest.hexdigest()}.arrow"
    if target.exists():
        return target
    incomplete = target.with_suffix(f".{uuid.uuid4().hex}.incomplete")
    try:
        pieces = _pieces(file, encoding)
        first = next(pieces)
        with pa.OSFile(str(incomplete), "wb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
            for piece in chain([first], pieces):
                writer.write_table(piece)
        incomplete.replace(target)
    finally:
        incomplete.unlink(missing_ok=True)
    return target


def _pieces(file: _File, encoding: str | None) -> Iterator[pa.Table]:
    """At least one table, all of one schema."""
    if file.format == "parquet":
        return _parquet_pieces(file)
    if file.format == "arrow":
        return _arrow_pieces(file)
    encoding = _text_encoding(file, encoding)
    if file.format in ("csv", "tsv"):
        return _csv_pieces(file, encoding)
    if file.format == "txt":
        return _text_pieces(file, encoding)
    return _json_pieces(file, encoding)


# Formats of bytes -------------------------------------------------------------------------------------------------


@contextmanager
def _seekable(file: _File) -> Iterator[Any]:
    if file.compression is None:
        with pa.memory_map(str(file.path)) if file.path.stat().st_size else pa.BufferReader(b"") as stream:
            yield stream
        return
    with tempfile.TemporaryFile(dir=_cache()) as plain:  # not in /tmp, which may be memory
        with _opened(file) as stream:
            shutil.copyfileobj(stream, plain)
        plain.seek(0)
        yield plain


def _parquet_pieces(file: _File) -> Iterator[pa.Table]:
    with _seekable(file) as stream:
        parquet = pq.ParquetFile(stream)
        yield from _typed_pieces(parquet.schema_arrow, parquet.iter_batches(batch_size=ROWS_AT_ONCE))


def _arrow_pieces(file: _File) -> Iterator[pa.Table]:
    with _seekable(file) as stream:
        is_file_format = bytes(stream.read(6)) == b"ARROW1"
        stream.seek(0)
        if is_file_format:
            reader = pa.ipc.open_file(stream)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            reader = batches = pa.ipc.open_stream(stream)
        yield from _typed_pieces(reader.schema, batches)


def _typed_pieces(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    # `datasets` has no dictionary type, which is how pandas' categories arrive.
    plain = [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in schema]
    schema = pa.schema(plain, metadata=schema.metadata)  # the metadata hold the features, such as class names
    yield schema.empty_table()
    for batch in batches:
        batch.validate(full=True)  # damaged bytes would otherwise show as a crash, or as text that is no UTF-8
        yield pa.Table.from_batches([batch]).cast(schema)


# Formats of text --------------------------------------------------------------------------------------------------


def _text_encoding(file: _File, wanted: str | None) -> str:
    """The encoding that decodes the whole file, strictly."""
    if wanted is not None:
        try:
            io.TextIOWrapper(io.BytesIO(), encoding=wanted)
        except LookupError as error:
            raise DataError(f"dataset.encoding: {wanted!r} is no text encoding; write one such as gb18030") from error
        offset = _undecodable(file, wanted)
        if offset is not None:
            raise DataError(
                f"{file.name}: byte {offset} does not decode as {wanted}; correct `dataset.encoding`, "
                "or leave it out to have utf-8 and gb18030 tried"
            )
        return "utf-8-sig" if codecs.lookup(wanted).name == "utf-8" else wanted
    offset = _undecodable(file, "utf-8")
    if offset is None:
        return "utf-8-sig"  # reads files with and without a byte order mark
    # Only then: gb18030 decodes much UTF-8 without complaint, into other characters.
    if _undecodable(file, "gb18030") is None:
        logger.warning("%s is not UTF-8; it is read as gb18030 (set dataset.encoding if it is neither)", file.name)
        return "gb18030"
    with _opened(file) as stream:
        utf16 = stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    remedy = (
        "it begins like UTF-16: set `dataset.encoding: utf-16`" if utf16 else "name it: `dataset.encoding: latin-1`"
    )
    raise DataError(f"{file.name}: byte {offset} is not UTF-8, and the encoding is not gb18030 either; {remedy}")


def _undecodable(file: _File, encoding: str) -> int | None:
    """Offset of the first byte that does not decode; None if all do."""
    decoder: Any = codecs.getincrementaldecoder(encoding)("strict")
    with _opened(file) as stream:
        position = 0
        while True:
            chunk = stream.read(1 << 20)
            pending = len(decoder.getstate()[0])  # bytes of a character that the chunk before began
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeError as error:
                return position - pending + getattr(error, "start", 0)
            if not chunk:
                return None
            position += len(chunk)


def _lines(file: _File, encoding: str, newline: str | None = None) -> Iterator[str]:
    with _opened(file) as stream, io.TextIOWrapper(stream, encoding=encoding, newline=newline) as text:
        empty = True
        for number, line in enumerate(text, 1):
            if "\0" in line:
                raise DataError(
                    f"{file.name}, line {number}: there is a NUL byte, which no text has; remove it, "
                    "or set `dataset.encoding` if the file is UTF-16"
                )
            empty = False
            yield line
        if empty:
            raise DataError(f"{file.name}: the file is empty; fill it or leave it out")


def _text_pieces(file: _File, encoding: str) -> Iterator[pa.Table]:
    for lines in _batches(_lines(file, encoding)):
        yield pa.table({"text": pa.array([line.removesuffix("\n") for line in lines], pa.string())})


def _csv_pieces(file: _File, encoding: str) -> Iterator[pa.Table]:
    rows = _csv_rows(file, encoding)
    line, header = next(rows, (1, None))
    if header is None:
        raise DataError(f"{file.name}, line 1: there is no header, only blank lines; name the columns there")
    if len(set(header)) < len(header) or not all(header):
        twice = sorted({name for name in header if name and header.count(name) > 1})
        what = f"column {twice[0]!r} is named twice" if twice else f"column {header.index('') + 1} has no name"
        raise DataError(
            f"{file.name}, line {line}: {what}; name every column once (pandas writes its index without a name, "
            "unless to_csv has index=False)"
        )
    empty = True
    for rows_of_batch in _batches(rows):
        batch: list[list[str | None]] = []
        for line, cells in rows_of_batch:
            if len(cells) > len(header):
                raise DataError(
                    f"{file.name}, line {line}: there are {len(cells)} cells for {len(header)} columns; "
                    "put cells that hold the delimiter, a quote or a line end in quotes"
                )
            batch.append([*cells, *[None] * (len(header) - len(cells))])
        empty = False
        columns = [pa.array(column, pa.string()) for column in zip(*batch, strict=True)]
        yield pa.table(dict(zip(header, columns, strict=True)))
    if empty:
        raise DataError(f"{file.name}, line {line}: nothing follows the header; add rows or leave the file out")


def _csv_rows(file: _File, encoding: str) -> Iterator[tuple[int, list[str]]]:
    """First line, counted from 1, and cells of each row; blank lines are no rows."""
    csv.field_size_limit(LONGEST_CELL)  # of the process; 128 KiB unless told
    # Quotes are the same in both, as pandas and `datasets` have it. strict: a stray quote is an error, not a guess.
    delimiter = "\t" if file.format == "tsv" else ","
    reader = csv.reader(_lines(file, encoding, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{file.name}, line {line}: in the row that begins here a cell begins with a quote that is not closed "
                f'at its end ({error}); put the whole cell in quotes and double those inside: """Good"", he said"'
            ) from error
        if cells:
            yield line, cells


_Records = Iterator[tuple[str, dict[str, Any]]]  # place in the file, record


def _json_pieces(file: _File, encoding: str) -> Iterator[pa.Table]:
    # Twice: a column's type is known at the end of the file only.
    schema = pa.schema([])
    for batch in _batches(_json_records(file, encoding)):
        schema = _widened(file, schema, batch)
    if not schema.names:
        raise DataError(f"{file.name}: there are no records with columns; add rows or leave the file out")
    for batch in _batches(_json_records(file, encoding)):
        yield pa.table([_json_column(file, batch, field.name, field.type) for field in schema], schema=schema)


def _json_records(file: _File, encoding: str) -> _Records:
    if file.format == "json":
        beginning = next((line.strip() for line in _lines(file, encoding) if line.strip()), "")
        if beginning.startswith("["):
            for row, record in enumerate(_parsed(file, "".join(_lines(file, encoding)), 1)):
                yield f"row {row}", _checked(file, f"row {row}", record)
            return
    for number, line in enumerate(_lines(file, encoding), 1):
        if line.strip():
            yield f"line {number}", _checked(file, f"line {number}", _parsed(file, line.removesuffix("\n"), number))


def _parsed(file: _File, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line, what = first_line, str(error)
        if isinstance(error, json.JSONDecodeError):
            line, what = first_line + error.lineno - 1, f"{error.msg}, column {error.colno}"
        raise DataError(
            f"{file.name}, line {line}: this is not JSON ({what}); correct it. "
            "A file holds one record per line, or (.json) a list of records"
        ) from error


def _checked(file: _File, place: str, record: object) -> dict[str, Any]:
    if isinstance(record, dict):
        return record
    raise DataError(f'{file.name}, {place}: {_short(record)} is no record; write {{"text": …, "label": …}}')


def _widened(file: _File, schema: pa.Schema, batch: list[tuple[str, dict[str, Any]]]) -> pa.Schema:
    for name in dict.fromkeys(key for _, record in batch for key in record):
        field = pa.field(name, _json_column(file, batch, name, None).type)
        try:
            schema = pa.unify_schemas([schema, pa.schema([field])], promote_options="permissive")
        except pa.ArrowException as error:
            place, record = next((p, r) for p, r in batch if r.get(name) is not None)
            raise _misfit(file, place, name, record[name], error) from error
    return schema


def _json_column(file: _File, batch: list[tuple[str, dict[str, Any]]], name: str, kind: Any) -> Any:
    values = [record.get(name) for _, record in batch]
    try:
        return _json_array(values, kind)
    except (ValueError, TypeError, OverflowError):
        for row, (place, _) in enumerate(batch):  # again, to find the row
            try:
                _json_array(values[: row + 1], kind)
            except (ValueError, TypeError, OverflowError) as error:
                raise _misfit(file, place, name, values[row], error) from error
        raise


def _json_array(values: list[Any], kind: Any) -> Any:
    kinds = set(map(type, values))
    if bool in kinds and kinds & {int, float}:
        raise TypeError("true and false do not go with numbers")  # Arrow reads them as 1.0 and 0.0 beside a float
    return pa.array(values, kind)


def _misfit(file: _File, place: str, column: str, value: object, error: Exception) -> DataError:
    return DataError(
        f"{file.name}, {place}: column {column!r} cannot hold {_short(value)} beside its other values ({error}); "
        "give all values of a column one type, such as text"
    )


def _short(value: object) -> str:
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _batches(items: Iterable[_T]) -> Iterator[list[_T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, ROWS_AT_ONCE)):
        yield batch


# Several files ----------------------------------------------------------------------------------------------------


def _with_common_types(names: list[str], parts: list[datasets.Dataset]) -> list[datasets.Dataset]:
    """The parts with columns in one order and of one type, so that an all-null column goes with one of text."""
    common = parts[0].features.copy()
    for name, part in zip(names, parts, strict=True):
        differing = sorted(common.keys() ^ part.features.keys())
        if not differing:
            wider = {column: _wider(common[column], part.features[column]) for column in common}
            differing = [column for column, feature in wider.items() if feature is None]
            common = datasets.Features({**common, **{c: f for c, f in wider.items() if f is not None}})
        if differing:
            raise DataError(
                f"{names[0]} and {name}: the columns {', '.join(map(repr, differing))} differ in name or type; "
                "give all files of a split the same columns, or name each under a split of its own in dataset.data_files"
            )
    aligned = [part.select_columns(list(common)) for part in parts]
    with _quiet():
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


def _read_splits(
    files: dict[str, list[str]], place: str, encoding: str | None, only: Collection[str] | None
) -> dict[str, Table]:
    return {split: read_files(files[split], encoding) for split in _wanted(files, place, only)}


def _wanted(splits: Iterable[str], place: str, only: Collection[str] | None) -> list[str]:
    splits = list(splits)
    missing = [] if only is None else [split for split in only if split not in splits]
    if missing:
        raise DataError(
            f"{_redacted(place)}: there is no split {missing[0]!r}, only {', '.join(splits)}; correct `dataset.splits`, "
            "or name the files of each split in `dataset.data_files`"
        )
    return [split for split in splits if only is None or split in only]


def _named_files(base: str | None, data_files: str | list[str] | dict[str, str | list[str]]) -> dict[str, list[str]]:
    if base is not None and "://" not in base and not Path(base).is_dir():
        raise DataError(
            f"{base}: there is no such folder; dataset.data_files are sought in it, or from here without it"
        )
    by_split = data_files if isinstance(data_files, dict) else {"train": data_files}
    files: dict[str, list[str]] = {}
    for split, patterns in by_split.items():
        found = chain.from_iterable(_matching(pattern, base) for pattern in _listed(patterns))
        # Once each: patterns may overlap.
        files[split] = list({file if "://" in file else str(Path(file).absolute()): file for file in found}.values())
    return files


def _home(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser())


def _listed(patterns: str | list[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else patterns


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
    return _resolved(pattern)


def _resolved(pattern: str) -> list[str]:
    try:
        with _quiet():
            found = resolve_pattern(pattern, os.curdir)
    except Exception as error:  # each fsspec protocol has errors of its own
        raise DataError(
            f"{_redacted(pattern)}: no file is found ({_redacted(str(error))}); correct the path or the pattern"
        ) from None
    return sorted(file for file in found if isinstance(file, str))


# Folders ----------------------------------------------------------------------------------------------------------


def _read_folder(folder: Path, dataset: DatasetSection, only: Collection[str] | None) -> dict[str, Table]:
    if (folder / "state.json").is_file():
        return {split: _saved(folder) for split in _wanted(["train"], str(folder), only)}
    if (folder / "dataset_dict.json").is_file():
        try:
            splits = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{folder / 'dataset_dict.json'}: it cannot be read ({error}); save it again") from error
        return {split: _saved(folder / split) for split in _wanted(splits, str(folder), only)}
    if dataset.name is not None or _has_configs(folder / "README.md"):
        loaded = _load_dataset(str(folder), dataset.name)
        return _tables(loaded, str(folder), only)
    return _read_splits(_files_by_split(str(folder)), str(folder), dataset.encoding, only)


def _saved(folder: Path) -> Table:
    try:
        with _quiet():
            data = datasets.load_from_disk(str(folder)).with_format(None)  # a saved format would turn text into tensors
    except (*_DAMAGE, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{folder}: the saved dataset is damaged ({error}); save it again by save_to_disk") from error
    return Table(data, (Origin(str(folder), len(data)),))


def _has_configs(readme: Path) -> bool:
    if not readme.is_file():
        return False
    try:
        metadata = huggingface_hub.metadata_load(readme)
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise DataError(f"{readme}: its metadata cannot be read ({error}); correct the YAML between the ---") from error
    return bool(metadata and metadata.get("configs"))


def _files_by_split(folder: str) -> dict[str, list[str]]:
    """Data files by the split their names tell, as `datasets` decides; those whose names tell none are `train`.

    `datasets` alone drops those: `reviews.csv` beside `test.csv` would be no split at all.
    """
    base = folder if "://" in folder else glob.escape(str(Path(folder).absolute()))
    try:
        with _quiet():
            every = _data_files(["**"], base)
            groups = get_data_patterns(base) if every else {}
            named = {str(split): _data_files(patterns, base) for split, patterns in groups.items()}
    except Exception as error:  # each fsspec protocol has errors of its own
        raise DataError(
            f"{_redacted(folder)}: the folder cannot be listed ({_redacted(str(error))}); check the path"
        ) from None
    files = {split: found for split, found in named.items() if found}
    splits_of = {file: [split for split in files if file in files[split]] for file in every}
    for file, splits in splits_of.items():
        if len(splits) > 1:
            raise DataError(
                f"{_redacted(file)}: its name tells of the splits {' and '.join(splits)}; name the files of each split in "
                "`dataset.data_files`"
            )
    strays = [file for file, splits in splits_of.items() if not splits]
    if strays and "train" in files:
        logger.warning(
            "%s: left out, since other files are named train: %s", _redacted(folder), _redacted(", ".join(strays))
        )
    elif strays:
        files = {"train": strays, **files}
    if not files:
        raise DataError(f"{_redacted(folder)}: the folder holds no data files; {KNOWN}")
    return files


def _data_files(patterns: list[str], base: str) -> list[str]:
    found: set[str] = set()
    for pattern in patterns:
        try:
            found.update(map(str, resolve_pattern(pattern, base)))
        except FileNotFoundError:
            continue  # a split has many patterns, few of which match
    return sorted(filter(_is_data_file, found))


def _is_data_file(address: str) -> bool:
    format, compression = _extensions(address)
    return format is not None or compression == "zip"  # whose member tells


# The Hub ----------------------------------------------------------------------------------------------------------


def _hub_id(path: str) -> tuple[str, str | None] | None:
    """Repository and revision of a Hub id or `hf://datasets/…`; None for everything else."""
    if address := re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?/?", path):
        return address[1], address[2]
    looks_local = path.startswith((".", "/")) or _extensions(path) != (None, None)
    if Path(path).exists() or looks_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        return None
    return path, None


def _read_hub(repository: str, dataset: DatasetSection, revision: str | None, only: Collection[str] | None) -> Source:
    commit = _commit(repository, revision)
    if commit is not None:
        loaded = _load_dataset(repository, dataset.name, revision=commit, data_files=dataset.data_files)
        return Source(_tables(loaded, repository, only), commit)
    # Offline `load_dataset` looks into its own prepared files only, and takes any revision for the one asked for.
    problem: DataError | None = None
    if (snapshot := _snapshot(repository, revision)) is not None:
        try:
            loaded = _load_dataset(str(snapshot), dataset.name, data_files=dataset.data_files, called=repository)
            return Source(_tables(loaded, repository, only), snapshot.name)
        except DataError as error:  # such as a snapshot with the files of another configuration alone
            problem = error
    try:
        loaded = _load_dataset(repository, dataset.name, data_files=dataset.data_files)
    except DataError as error:
        raise problem or error from None
    prepared_from = _prepared_commit(loaded)
    if revision not in (None, "main", prepared_from):
        raise DataError(
            f"{repository}: the Hub is not reached, and what is cached is revision {prepared_from or 'unknown'}, not "
            f"{revision}; connect once to fetch it, or change `dataset.revision`"
        )
    return Source(_tables(loaded, repository, only), prepared_from)


def _commit(repository: str, revision: str | None) -> str | None:
    """Commit of the revision; None if the Hub is not reached."""
    if datasets.config.HF_HUB_OFFLINE:
        return None
    try:
        with _quiet():
            return huggingface_hub.HfApi().dataset_info(repository, revision=revision, timeout=20).sha
    except GatedRepoError as error:
        raise DataError(
            f"{repository}: this dataset is gated; ask for access at https://huggingface.co/datasets/{repository} "
            "and log in by `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise DataError(
            f"{repository}: there is no revision {revision!r}; correct `dataset.revision`, or leave it out for main"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(
            f"{repository}: there is no such file or folder here, and no such dataset on the Hub that you may read; "
            "correct `dataset.path`, or log in by `hf auth login` if it is private"
        ) from error
    except Exception as error:  # timeouts, proxies, 5xx: the client's HTTP library, and so its errors, changed twice
        logger.warning("%s: the Hub is not reached (%s); its cache is read", repository, type(error).__name__)
        return None


def _snapshot(repository: str, revision: str | None) -> Path | None:
    """The repository's folder in the Hub cache; None if it is not there, or shards of it are missing."""
    try:
        folder = Path(
            huggingface_hub.snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    # The cache keeps whatever was fetched: README.md alone, or the first shards of a download that broke off.
    shards: dict[tuple[Path, str, int], int] = {}
    for file in folder.rglob("*"):
        if match := _SHARD.match(file.name):
            key = (file.parent, match["stem"], int(match["count"]))
            shards[key] = shards.get(key, 0) + 1
    complete = all(found == count for (_, _, count), found in shards.items())
    has_data = any(_is_data_file(file.name) for file in folder.rglob("*"))
    return folder if complete and has_data else None


def _prepared_commit(loaded: datasets.DatasetDict) -> str | None:
    """`datasets` names the folder of files prepared from the Hub after the commit."""
    folders = {Path(file["filename"]).parent.name for data in loaded.values() for file in data.cache_files}
    commit = folders.pop() if len(folders) == 1 else ""
    return commit if re.fullmatch(r"[0-9a-f]{40}", commit) else None


def _tables(loaded: datasets.DatasetDict, name: str, only: Collection[str] | None) -> dict[str, Table]:
    splits = _wanted(map(str, loaded), name, only)
    return {split: Table(loaded[split], (Origin(f"{name} {split}", len(loaded[split])),)) for split in splits}


def _load_dataset(
    path: str,
    name: str | None,
    revision: str | None = None,
    data_files: Any = None,
    called: str | None = None,
) -> datasets.DatasetDict:
    called = called or path
    try:
        with _quiet():
            return datasets.load_dataset(path, name, revision=revision, data_files=data_files)
    except DatasetGenerationError as error:
        raise DataError(
            f"{called}: its files cannot be read ({_first_lines(error.__cause__ or error)}); name them in "
            "`dataset.data_files`, or correct the dataset"
        ) from error
    except Exception as error:  # of six libraries, many of them bare ValueError
        raise DataError(f"{called}: {_first_lines(error)}; {_load_remedy(error)}") from error


def _load_remedy(error: Exception) -> str:
    text = str(error)
    if "Available:" in text or "Config name is missing" in text or "multiple" in text or "Available configs" in text:
        return "name one of them: `dataset.name`"
    if "script" in text:
        return "export the dataset to parquet and name those files, since scripts are not run"
    if isinstance(error, ConnectionError) or datasets.config.HF_HUB_OFFLINE:
        return "nothing of it is cached here: connect once to fetch it, or name local files in `dataset.path`"
    return "correct `dataset.path`, `name`, `revision` or `data_files`"


def _first_lines(error: BaseException) -> str:
    return _redacted(" ".join(str(error).splitlines()[:2]) or type(error).__name__)


def _redacted(text: str) -> str:
    """The text without user, password, query and fragment of the addresses in it."""
    text = re.sub(r"(\w://)[^/\s]*@", r"\1", text)
    return re.sub(r"(\w://[^\s?#'\"]*)[?#][^\s'\"]*", r"\1", text)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and log lines of `datasets` and the Hub client, whose settings are put back."""
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

"""One data file on this machine to Arrow tables: strictly as written, or an error that names the line.

Not read by `load_dataset`, because what a cell says must not depend on its neighbours: pandas turns `NA` into null and
`007` into 7, Arrow's JSON reader turns dates in texts into timestamps, and neither says in which line a file is broken.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import logging
import lzma
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq

from accel_trainer.errors import DataError

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 1000  # what `datasets` writes per record batch; its row lookup is made for it
# Beyond these a file is damaged or made to fill memory: a quote never closed, a line that decompresses without end.
LONGEST_CELL = 2**27  # characters, for each of which the csv module needs 4 bytes
# Columns of a CSV or TSV file are sought between these if its header holds none of its own delimiters.
OTHER_DELIMITERS = {"csv": "\t;|", "tsv": ";|,"}
SAMPLE = 2**16  # bytes of which an encoding is judged where two decode the file
LONGEST_LINE = 2**28  # characters; a .json file may hold all its records in one line
MOST_COLUMNS = 10_000

# What decoders raise where a file is damaged, and the operating system for reasons of its own.
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError, pa.ArrowException)

_T = TypeVar("_T")


class NoRows(DataError):
    """A text file has no rows; perhaps it names columns."""

    columns: Sequence[str] = ()


class WrongEncoding(DataError):
    """A text file is not in the encoding that was expected."""

    def __init__(self, what: str, remedy: str) -> None:
        self.what = what
        super().__init__(f"{what}; {remedy}")


@contextmanager
def converted_by_the_user() -> Iterator[None]:
    """Where no recipe can name the encoding of a text file, say what else helps."""
    try:
        yield
    except WrongEncoding as error:
        raise DataError(f"{error.what}; convert the file to UTF-8") from error


_Record = tuple[str, dict[str, Any]]  # place in the file, columns


@dataclass(frozen=True)
class DataFile:
    """A file to be read."""

    name: str  # for people
    path: Path  # on this machine
    format: str  # a value of FORMATS
    compression: str | None  # one of COMPRESSIONS


def file_pieces(file: DataFile, encoding: str | None, scratch: Path) -> Iterator[pa.Table]:
    """The rows as at least one table, all of one schema.

    Args:
        file: what to read.
        encoding: of a text format; None: utf-8 with or without BOM, else gb18030.
        scratch: folder on a disk with room for the file when decompressed.

    Raises:
        DataError: a mistake in a text file, with its line.
    """
    if file.format in ("parquet", "arrow"):
        return _binary_pieces(file, scratch)
    encoding = _text_encoding(file, encoding)
    if file.format in ("csv", "tsv"):
        return _csv_pieces(file, encoding)
    if file.format == "txt":
        return _text_pieces(file, encoding)
    return _json_pieces(file, encoding)


def zip_member(name: str, path: Path) -> str:
    """The one file in an archive."""
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
def _opened(file: DataFile) -> Iterator[BinaryIO]:
    """The bytes of the file, decompressed."""
    if file.compression == "zip":
        member = zip_member(file.name, file.path)
        with zipfile.ZipFile(file.path) as archive, archive.open(member) as stream:
            yield cast(BinaryIO, stream)
        return
    with _OPENERS[file.compression](file.path) as stream:
        yield stream


# --- formats of bytes -------------------------------------------------------------------------------------------------


def _binary_pieces(file: DataFile, scratch: Path) -> Iterator[pa.Table]:
    with _seekable(file, scratch) as stream:
        schema, batches = (_parquet if file.format == "parquet" else _arrow)(stream)
        _check_columns(file, len(schema))
        # `datasets` has no dictionary type, which is how pandas' categories arrive.
        plain = [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in schema]
        schema = pa.schema(plain, metadata=schema.metadata)  # the metadata hold the features, such as class names
        yield schema.empty_table()
        for batch in batches:
            batch.validate(full=True)  # damaged bytes would otherwise show as a crash, or as text that is no UTF-8
            yield pa.Table.from_batches([batch]).cast(schema)


@contextmanager
def _seekable(file: DataFile, scratch: Path) -> Iterator[Any]:
    if file.compression is None:
        with pa.memory_map(str(file.path)) if file.path.stat().st_size else pa.BufferReader(b"") as stream:
            yield stream
        return
    with tempfile.TemporaryFile(dir=scratch) as plain:  # not in /tmp, which may be memory
        with _opened(file) as stream:
            shutil.copyfileobj(stream, plain)
        plain.seek(0)
        yield plain


def _parquet(stream: Any) -> tuple[pa.Schema, Iterable[pa.RecordBatch]]:
    parquet = pq.ParquetFile(stream)
    return parquet.schema_arrow, parquet.iter_batches(batch_size=ROWS_AT_ONCE)


def _arrow(stream: Any) -> tuple[pa.Schema, Iterable[pa.RecordBatch]]:
    is_file_format = bytes(stream.read(6)) == b"ARROW1"
    stream.seek(0)
    if is_file_format:
        reader = pa.ipc.open_file(stream)
        return reader.schema, map(reader.get_batch, range(reader.num_record_batches))
    reader = pa.ipc.open_stream(stream)
    return reader.schema, reader


# --- formats of text --------------------------------------------------------------------------------------------------


def _text_encoding(file: DataFile, wanted: str | None) -> str:
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
    if _undecodable(file, "gb18030") is None and _has_wide_characters(file):
        if _reads_like_big5(file):
            raise WrongEncoding(
                f"{file.name}: it is not UTF-8, and decodes as gb18030 as well as Big5, as which it reads better",
                "set `dataset.encoding: cp950` if it is Big5, else `dataset.encoding: gb18030`",
            )
        logger.warning(
            "%s is not UTF-8; it is read as gb18030 (if it is neither, convert it, or set dataset.encoding)", file.name
        )
        return "gb18030"
    raise _unknown_encoding(file, offset)


def _has_wide_characters(file: DataFile) -> bool:
    """Whether bytes beyond ASCII stand side by side, as in Chinese; the accented letters of latin-1 hardly ever do."""
    with _opened(file) as stream:
        return any(re.search(rb"[\x80-\xff]{2}", chunk) for chunk in iter(partial(stream.read, 1 << 20), b""))


def _reads_like_big5(file: DataFile) -> bool:
    """Whether a file that decodes as gb18030 is more likely Big5, of which much decodes as both.

    A judgement by the characters in everyday use, which both encodings keep apart from the rest: text has little else,
    and the other encoding's text, misread, has much.
    """
    if _undecodable(file, "cp950") is not None:
        return False
    with _opened(file) as stream:
        sample = stream.read(SAMPLE)
    return _everyday_share(sample, "cp950", 0xA440, 0xC67E) > _everyday_share(sample, "gb18030", 0xB0A1, 0xD7F9)


def _everyday_share(sample: bytes, encoding: str, first: int, last: int) -> float:
    """Share of the Chinese characters whose two bytes lie from `first` to `last`; 0 if there is none."""
    text = re.sub("[^\u3400-\u9fff]", "", sample.decode(encoding, errors="ignore"))
    everyday = sum(first <= int.from_bytes(character.encode(encoding)) <= last for character in text)
    return everyday / max(1, len(text))


def _unknown_encoding(file: DataFile, offset: int) -> DataError:
    """What to say of a file that is neither UTF-8, undecodable at `offset`, nor gb18030."""
    with _opened(file) as stream:
        if stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            what = f"{file.name}: it begins like UTF-16, not UTF-8"
            return WrongEncoding(what, "set `dataset.encoding: utf-16`")
    first, undecodable, beyond_ascii = 0, 0, 0
    with _opened(file) as stream:
        for number, line in enumerate(iter(partial(stream.readline, LONGEST_LINE), b""), 1):
            beyond_ascii += not line.removeprefix(codecs.BOM_UTF8).isascii()
            try:
                line.decode()
            except UnicodeDecodeError:
                first, undecodable = first or number, undecodable + 1
    what = f"{file.name}, line {first}: it is not UTF-8 (byte {offset}), and the file is no gb18030 text either"
    if undecodable < beyond_ascii:
        return DataError(
            f"{what}; {undecodable} of its {beyond_ascii} lines beyond ASCII {'is' if undecodable == 1 else 'are'} not UTF-8, "
            "so encodings are mixed: write those lines again as UTF-8"
        )
    return WrongEncoding(
        what,
        "set `dataset.encoding` to what it is, such as cp1252 for Western Europe (the latin-1 of Windows), cp950, shift_jis or "
        "euc_kr",
    )


def _undecodable(file: DataFile, encoding: str) -> int | None:
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


def _lines(file: DataFile, encoding: str, newline: str | None = None) -> Iterator[str]:
    with _opened(file) as stream, io.TextIOWrapper(stream, encoding=encoding, newline=newline) as text:
        number = 0
        for number, line in enumerate(iter(partial(text.readline, LONGEST_LINE + 1), ""), 1):
            if len(line) > LONGEST_LINE:
                raise DataError(
                    f"{file.name}, line {number}: it is longer than {LONGEST_LINE} characters; break it up, "
                    "or write the rows as lines (.jsonl)"
                )
            if "\0" in line:
                raise WrongEncoding(
                    f"{file.name}, line {number}: there is a NUL byte, which no text has",
                    "remove it, or set `dataset.encoding` if the file is UTF-16",
                )
            yield line
        if number == 0:
            raise NoRows(f"{file.name}: the file is empty; fill it or leave it out")


def _text_pieces(file: DataFile, encoding: str) -> Iterator[pa.Table]:
    for lines in _batches(_lines(file, encoding)):
        yield pa.table({"text": pa.array([line.removesuffix("\n") for line in lines], pa.string())})


def _csv_pieces(file: DataFile, encoding: str) -> Iterator[pa.Table]:
    rows = _csv_rows(file, encoding)
    line, header = next(rows, (1, None))
    if header is None:
        raise NoRows(f"{file.name}, line 1: there is no header, only blank lines; name the columns there")
    _check_columns(file, len(header))
    other = _other_delimiter(file, header)
    if other is not None:
        by_commas = f"save it as .csv with commas, by pandas.read_csv(…, sep={other!r}).to_csv(…, index=False)"
        remedy = {"\t": "end its name in .tsv", ",": "end its name in .csv"}.get(other, by_commas)
        raise DataError(
            f"{file.name}, line {line}: the columns seem to be separated by {other!r}, which a .{file.format} file does not "
            f"do: its header {_short(header[0])} would be one column; {remedy}"
        )
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
        error = NoRows(f"{file.name}, line {line}: nothing follows the header; add rows or leave the file out")
        error.columns = header
        raise error


def _other_delimiter(file: DataFile, header: list[str]) -> str | None:
    """What separates the columns of a header that is one cell, if it is not the delimiter of the format."""
    if len(header) > 1:
        return None
    split = ((delimiter, header[0].split(delimiter)) for delimiter in OTHER_DELIMITERS[file.format])
    return next((delimiter for delimiter, names in split if len(names) > 1 and all(map(str.strip, names))), None)


def _csv_rows(file: DataFile, encoding: str) -> Iterator[tuple[int, list[str]]]:
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


def _json_pieces(file: DataFile, encoding: str) -> Iterator[pa.Table]:
    # Twice: a column's type is known at the end of the file only.
    schema, empty = pa.schema([]), True
    for batch in _batches(_json_records(file, encoding)):
        schema, empty = _widened(file, schema, batch), False
    if not schema.names:
        message = f"{file.name}: there are no records with columns; add rows or leave the file out"
        raise NoRows(message) if empty else DataError(message)
    for batch in _batches(_json_records(file, encoding)):
        yield pa.table([_json_column(file, batch, field.name, field.type) for field in schema], schema=schema)


def _json_records(file: DataFile, encoding: str) -> Iterator[_Record]:
    for place, value in _json_values(file, encoding):
        if not isinstance(value, dict):
            raise DataError(f'{file.name}, {place}: {_short(value)} is no record; write {{"text": …, "label": …}}')
        yield place, value


def _json_values(file: DataFile, encoding: str) -> Iterator[tuple[str, object]]:
    if file.format == "json":
        beginning = next((line.strip() for line in _lines(file, encoding) if line.strip()), "")
        if beginning.startswith("["):
            for row, value in enumerate(_parsed(file, "".join(_lines(file, encoding)), 1), 1):
                yield f"row {row}", value
            return
    for number, line in enumerate(_lines(file, encoding), 1):
        if line.strip():
            yield f"line {number}", _parsed(file, line.removesuffix("\n"), number)


def _parsed(file: DataFile, text: str, first_line: int) -> Any:
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


def _widened(file: DataFile, schema: pa.Schema, batch: list[_Record]) -> pa.Schema:
    names = dict.fromkeys(key for _, record in batch for key in record)
    _check_columns(file, len({*schema.names, *names}))
    for name in names:
        if re.search("[\ud800-\udfff]", name):
            place = next(place for place, record in batch if name in record)
            raise DataError(f"{file.name}, {place}: the column name {_short(name)} holds half a character; correct it")
    fields = [pa.field(name, _json_column(file, batch, name, None).type) for name in names]
    try:
        return pa.unify_schemas([schema, pa.schema(fields)], promote_options="permissive")
    except pa.ArrowException as error:
        for field in fields:  # again, to find the column; all at once is faster by their number
            try:
                pa.unify_schemas([schema, pa.schema([field])], promote_options="permissive")
            except pa.ArrowException as its_own:
                place, record = next((p, r) for p, r in batch if r.get(field.name) is not None)
                raise _misfit(file, place, field.name, record[field.name], its_own) from error
        raise


def _json_column(file: DataFile, batch: list[_Record], name: str, kind: Any) -> Any:
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


def _misfit(file: DataFile, place: str, column: str, value: object, error: Exception) -> DataError:
    return DataError(
        f"{file.name}, {place}: column {column!r} cannot hold {_short(value)} beside its other values ({error}); "
        "give all values of a column one type, such as text"
    )


def _check_columns(file: DataFile, count: int) -> None:
    if count > MOST_COLUMNS:
        raise DataError(
            f"{file.name}: there are {count} columns; keep those of texts and labels, {MOST_COLUMNS} at most"
        )


def _short(value: object) -> str:
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _batches(items: Iterable[_T]) -> Iterator[list[_T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, ROWS_AT_ONCE)):
        yield batch

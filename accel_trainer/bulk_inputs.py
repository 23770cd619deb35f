"""The files that are to be labelled, each with its rows in parts that memory and a bad day can bear.

Parquet files are read as they lie, row group by row group. Others are turned into Arrow files in the cache of `datasets`
first, as for training, so that any row of theirs is found without reading those before it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from accel_trainer.bulk_types import common_schema, is_text
from accel_trainer.data_file import DAMAGE, NoRows, converted_by_the_user
from accel_trainer.errors import DataError
from accel_trainer.file_names import extensions
from accel_trainer.tables import READER, damaged, open_prepared, prepared_folder, read_files
from accel_trainer.writing import replaced

BUFFER = 2**20  # bytes of a column that are read at a time
END = 2**16  # bytes of a Parquet file that tell it from another, with its footer
TEXTS_AT_ONCE = 10_000  # of one column


@dataclass(frozen=True)
class Input:
    """A file to be labelled."""

    path: Path
    name: str  # of what becomes of it
    size: int  # bytes
    mtime_ns: int
    schema: pa.Schema  # without dictionaries and metadata
    groups: tuple[int, ...]  # rows by row group; of other files than Parquet's, all
    content: str  # a hash that tells it from another: of the end of a Parquet file, of all of others

    @property
    def rows(self) -> int:
        """How many there are."""
        return sum(self.groups)

    @property
    def identity(self) -> dict[str, str | int]:
        """What tells whether it is the file that it was, wherever it lies; its path is for people."""
        return {"path": str(self.path), "bytes": self.size, "rows": self.rows, "content": self.content}

    def check_unchanged(self) -> None:
        """See that the file is the one that was planned with.

        Raises:
            DataError: it is not.
        """
        try:
            status = self.path.stat()
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}; bring the file back") from error
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise DataError(f"{self.path}: it has changed since the start; leave files alone while they are labelled")

    def place(self, row: int) -> str:
        """Where a row is found, as `Table.place` has it."""
        return f"{self.path}, row {row + 1}"

    def parts(self, most: int) -> list[tuple[int, int]]:
        """First row, and row after the last, of parts of so many rows at most; whole row groups where they are no larger.

        A file without rows has one part.
        """
        found: list[tuple[int, int]] = []
        start = stop = 0
        for size in self.groups:
            if stop > start and stop - start + size > most:
                found.append((start, stop))
                start = stop
            stop += size
            while stop - start > most:  # a row group larger than a part
                found.append((start, start + most))
                start += most
        return [*found, (start, stop)] if stop > start or not found else found

    def tables(self, start: int, stop: int, at_once: int) -> Iterator[pa.Table]:
        """Rows from `start` to before `stop`, in tables of about `at_once` and less than twice as many.

        Raises:
            DataError: the file is damaged, or has changed.
        """
        self.check_unchanged()
        try:
            yield from _gathered(_parquet_rows(self, start, stop, at_once) if _is_parquet(self.path)
                                 else _prepared_rows(self, start, stop, at_once), at_once)  # fmt: skip
        except DAMAGE as error:
            raise _damaged(self.path, error) from error
        self.check_unchanged()


def _gathered(tables: Iterable[pa.Table], at_once: int) -> Iterator[pa.Table]:
    pieces: list[pa.Table] = []
    for table in tables:
        pieces.append(table)
        if sum(map(len, pieces)) >= at_once:
            yield pa.concat_tables(pieces)
            pieces = []
    if pieces:
        yield pa.concat_tables(pieces)


def _parquet_rows(source: Input, start: int, stop: int, at_once: int) -> Iterator[pa.Table]:
    ends = list(accumulate(source.groups))
    groups = [i for i, end in enumerate(ends) if end > start and end - source.groups[i] < stop]
    if not groups:
        return
    row = ends[groups[0]] - source.groups[groups[0]]
    with pq.ParquetFile(source.path, buffer_size=BUFFER) as file:
        for batch in file.iter_batches(batch_size=at_once, row_groups=groups):
            first, last = max(start - row, 0), min(stop - row, len(batch))
            row += len(batch)
            if first < last:
                batch.validate(full=True)  # damaged bytes would otherwise show as a crash, or as text that is no UTF-8
                yield _as_planned(source, pa.Table.from_batches([batch.slice(first, last - first)]))
            if row >= stop:
                return


def _as_planned(source: Input, rows: pa.Table) -> pa.Table:
    try:
        return rows.select(source.schema.names).cast(source.schema)
    except (pa.ArrowException, KeyError) as error:
        raise DataError(
            f"{source.path}: its values do not fit into the types that all files have in common ({error}); give the columns of "
            "all files the same types"
        ) from error


@lru_cache(maxsize=4)  # parts follow each other; a file that is open counts against the system's limit
def _prepared_data(path: Path, size: int, mtime_ns: int) -> datasets.Dataset:
    return open_prepared(_prepared(path, size, mtime_ns), str(path))


@cache
def _prepared(path: Path, size: int, mtime_ns: int) -> Path:
    """The Arrow file of a file's rows.

    It is found by the hash of all bytes once; a note beside it, by what the system says of the file, spares that the other
    processes of the machine, and the next launch. Nobody can set the time of the last change of anything, `st_ctime`.
    """
    seen = f"{path}\0{size}\0{mtime_ns}\0{path.stat().st_ctime_ns}\0{READER}"
    note = prepared_folder() / f"{hashlib.sha256(seen.encode()).hexdigest()}.prepared"
    with suppress(OSError, ValueError):
        noted = note.with_name(note.read_text(encoding="utf-8"))
        if noted.is_file():
            return noted
    found = Path(read_files([path]).data.cache_files[0]["filename"])
    with suppress(OSError), replaced(note) as writing:
        writing.write_text(found.name, encoding="utf-8")
    return found


def _prepared_rows(source: Input, start: int, stop: int, at_once: int) -> Iterator[pa.Table]:
    if start == stop:
        return  # there may be nothing that could be prepared
    rows = _prepared_data(source.path, source.size, source.mtime_ns).with_format("arrow")
    for first in range(start, stop, at_once):
        yield _as_planned(source, rows[first : min(first + at_once, stop)])


def _is_parquet(path: Path) -> bool:
    return extensions(path.name) == ("parquet", None)


def _damaged(path: Path, error: Exception) -> DataError:
    if isinstance(error, OSError) and error.errno is not None:
        remedy = "give yourself the right to it" if isinstance(error, PermissionError) else "see to it, and to its disk"
        return DataError(f"{path}: it cannot be read ({error.strerror}); {remedy}")
    return damaged(path, " ".join(filter(None, extensions(path.name))), error)


def read_inputs(files: dict[str, Path], text_columns: Callable[[str, Sequence[str]], list[str]]) -> list[Input]:
    """What is in the files, with all mistakes that show without reading every row.

    Args:
        files: as `find_inputs` gives them.
        text_columns: the columns of the texts, by a file's name and its columns; it raises where one is missing.

    Raises:
        DataError: a file cannot be read, a text is missing, the columns of two files differ, or there are no rows.
    """
    inputs = []
    for name, path in files.items():
        source = _read_input(path, name)
        # An empty shard, of which the others tell what columns it would have.
        for column in text_columns(str(path), source.schema.names) if source.schema.names or source.rows else ():
            _check_texts(source, column)
        inputs.append(source)
    if not any(source.rows for source in inputs):
        more = f" and {len(inputs) - 1} more" if len(inputs) > 1 else ""
        raise DataError(f"{inputs[0].path}{more}: there are no rows to label; name files that have some")
    common = common_schema({source.path: source.schema for source in inputs if source.schema.names})
    return [replace(source, schema=common) for source in inputs]


def _read_input(path: Path, name: str) -> Input:
    try:
        status = path.stat()
        if _is_parquet(path):
            with pq.ParquetFile(path) as file:
                metadata, whole = file.metadata, file.schema_arrow
                groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
            content = _hash_of_end(path, max(END, metadata.serialized_size))
        else:
            with converted_by_the_user():
                rows = _prepared_data(path, status.st_size, status.st_mtime_ns)
            whole, groups = rows.features.arrow_schema, (len(rows),)
            content = _prepared(path, status.st_size, status.st_mtime_ns).stem
    except NoRows as empty:
        whole, groups = pa.schema([(column, pa.null()) for column in empty.columns]), (0,)
        content = _hash_of_end(path, END)
    except DAMAGE as error:
        raise _damaged(path, error) from error
    names = list(whole.names)
    if len(set(names)) < len(names):
        twice = min(column for column in names if names.count(column) > 1)
        raise DataError(f"{path}: column {twice!r} is there twice; name every column once")
    plain = [(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in whole]
    return Input(path, name, status.st_size, status.st_mtime_ns, pa.schema(plain), groups, content)


def _hash_of_end(path: Path, length: int) -> str:
    with path.open("rb") as file:
        file.seek(-min(length, path.stat().st_size), os.SEEK_END)
        return hashlib.sha256(file.read()).hexdigest()


def _check_texts(source: Input, column: str) -> None:
    """See that a column holds texts, as far as that is known without reading them all.

    Raises:
        DataError: it does not.
    """
    if not source.rows:
        return
    kind = source.schema.field(column).type
    if not is_text(kind) and not pa.types.is_null(kind):
        raise DataError(
            f"{source.path}: column {column!r} holds {kind}, not text; name the column of the text, or save it as text"
        )
    try:
        missing = 0 if pa.types.is_null(kind) else _first_null(source, column)
    except DAMAGE as error:
        raise _damaged(source.path, error) from error
    if missing is not None:
        raise DataError(f"{source.place(missing)}: column {column!r} holds no text; complete or remove the row")


def _first_null(source: Input, column: str) -> int | None:
    """The first row without a value, so far as the file counts them; where it does not they show when it is their turn."""
    if not _is_parquet(source.path):
        cells = _prepared_data(source.path, source.size, source.mtime_ns).data.column(column)
        return _null_in(cells) if cells.null_count else None
    with pq.ParquetFile(source.path, buffer_size=BUFFER) as file:
        for group in range(file.metadata.num_row_groups):
            chunks = (file.metadata.row_group(group).column(i) for i in range(file.metadata.num_columns))
            counts = next((chunk.statistics for chunk in chunks if chunk.path_in_schema == column), None)
            if counts is None or not counts.has_null_count or not counts.null_count:
                continue
            row = sum(source.groups[:group])
            for batch in file.iter_batches(TEXTS_AT_ONCE, row_groups=[group], columns=[column]):
                missing = _null_in(batch.column(column))
                if missing is not None:
                    return row + missing
                row += len(batch)
    return None


def _null_in(cells: pa.Array | pa.ChunkedArray) -> int | None:
    row: int = pc.index(cells.is_null(), True).as_py()
    return row if row >= 0 else None

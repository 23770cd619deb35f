"""The files that are to be labelled, each with its rows in parts that memory and a bad day can bear.

Parquet files are read as they lie, row group by row group. Others are turned into Arrow files in the cache of `datasets`
first, as for training, so that any row of theirs is found without reading those before it.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from accel_trainer.data_file import DAMAGE
from accel_trainer.errors import DataError, UserError
from accel_trainer.file_names import KNOWN, extensions, is_data_file
from accel_trainer.tables import Table, read_files

BUFFER = 2**20  # bytes of a column that are read at a time


@dataclass(frozen=True)
class Input:
    """A file to be labelled."""

    path: Path
    name: str  # of what becomes of it
    size: int  # bytes
    mtime_ns: int
    schema: pa.Schema  # without dictionaries and metadata
    groups: tuple[int, ...]  # rows by row group; of other files than Parquet's, all

    @property
    def rows(self) -> int:
        """How many there are."""
        return sum(self.groups)

    @property
    def identity(self) -> dict[str, str | int]:
        """What tells whether it is the file that it was."""
        return {"path": str(self.path), "bytes": self.size, "mtime_ns": self.mtime_ns, "rows": self.rows}

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
                yield (
                    pa.Table.from_batches([batch.slice(first, last - first)])
                    .select(source.schema.names)
                    .cast(source.schema)
                )
            if row >= stop:
                return


@lru_cache(maxsize=4)  # parts follow each other; a file that is open counts against the system's limit
def _prepared(path: Path, _size: int, _mtime_ns: int) -> Table:
    return read_files([path])


def _prepared_rows(source: Input, start: int, stop: int, at_once: int) -> Iterator[pa.Table]:
    rows = _prepared(source.path, source.size, source.mtime_ns).data.with_format("arrow")
    for first in range(start, stop, at_once):
        yield rows[first : min(first + at_once, stop)].select(source.schema.names).cast(source.schema)


def _is_parquet(path: Path) -> bool:
    return extensions(path.name) == ("parquet", None)


def _damaged(path: Path, error: Exception) -> DataError:
    if isinstance(error, OSError) and error.errno is not None:
        return DataError(f"{path}: it cannot be read ({error.strerror}); give yourself the right to it")
    return DataError(
        f"{path}: the file is damaged, cut off, or no Parquet file as its name says ({error}); write it again"
    )


def find_inputs(patterns: Sequence[str], output: Path) -> dict[str, Path]:
    """The files that some patterns name, by the names of what becomes of them, in the order in which those are read.

    Args:
        patterns: paths, or patterns with `*`, `?`, `[…]` and `**`.
        output: the folder of what becomes of them.

    Raises:
        UserError: nothing is found, two files would have one name, or a file lies in the output folder.
    """
    files: dict[Path, None] = {}
    results = output.resolve()
    for pattern in patterns:
        if "://" in pattern:
            raise UserError(f"--input {pattern}: only files of this machine are labelled by the folder; copy them here")
        literal = Path(pattern).expanduser()
        if literal.is_dir():
            raise UserError(
                f"--input {pattern}: this is a folder; name the files in it, such as '{literal / '*.parquet'}'"
            )
        found = [path for path in ([literal] if literal.exists() else _matching(literal)) if path.is_file()]
        if not found:
            raise UserError(
                f"--input {pattern}: there is no such file, seen from {Path.cwd()}; correct the path or pattern"
            )
        # What a pattern finds among the results of an earlier launch is no input.
        listed = [path for path in found if not path.resolve().is_relative_to(results)]
        if not listed:
            raise UserError(
                f"--input {pattern}: {found[0]} lies in --output {output}; name another folder for what is labelled"
            )
        files |= dict.fromkeys(path.absolute() for path in listed)
    named: dict[str, Path] = {}
    for path in files:
        if not is_data_file(path.name):
            raise UserError(
                f"--input {path}: its extension does not tell the format; narrow the pattern, or rename it: {KNOWN}"
            )
        name = output_name(path)
        if name in named:
            raise UserError(
                f"--input {named[name]} and {path}: both would be labelled into {output / name}; rename one of them, or label "
                "them into two folders"
            )
        named[name] = path
    # As readers of the output sort the paths in it, so that they find the rows in this order.
    return {name: named[name] for name in sorted(named, key=lambda name: f"{name}/")}


def _matching(pattern: Path) -> list[Path]:
    return [Path(path) for path in glob.glob(str(pattern), recursive=True)]  # noqa: PTH207, as Path's takes no absolute ones


def output_name(path: Path) -> str:
    """What becomes of a file is called as the file is, without extensions, and so that no reader of folders leaves it out."""
    compression = extensions(path.name)[1]
    stem = path.name.removesuffix(path.suffix) if compression else path.name
    bare = Path(stem).stem if extensions(stem)[0] else stem
    # Hidden from pandas and `datasets`: "." and "_" at the beginning. A column to them: "=".
    return bare.lstrip("._").replace("=", "-") or "rows"


def read_inputs(files: dict[str, Path], text_columns: Callable[[str, Sequence[str]], list[str]]) -> list[Input]:
    """What is in the files, with all mistakes that show without reading every row.

    Args:
        files: as `find_inputs` gives them.
        text_columns: the columns of the texts, by a file's name and its columns; it raises where one is missing.

    Raises:
        DataError: a file cannot be read, a text is missing, or the columns of two files differ.
    """
    inputs = []
    for name, path in files.items():
        source = _read_input(path, name)
        for column in text_columns(str(path), source.schema.names):
            _check_texts(source, column)
        inputs.append(source)
    common = _common_schema(inputs)
    return [Input(s.path, s.name, s.size, s.mtime_ns, common, s.groups) for s in inputs]


def _read_input(path: Path, name: str) -> Input:
    try:
        status = path.stat()
        if _is_parquet(path):
            with pq.ParquetFile(path) as file:
                metadata, whole = file.metadata, file.schema_arrow
                groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        else:
            table = _prepared(path, status.st_size, status.st_mtime_ns)
            whole, groups = table.data.features.arrow_schema, (len(table.data),)
    except DAMAGE as error:
        raise _damaged(path, error) from error
    names = list(whole.names)
    if len(set(names)) < len(names):
        twice = min(column for column in names if names.count(column) > 1)
        raise DataError(f"{path}: column {twice!r} is there twice; name every column once")
    plain = [(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in whole]
    return Input(path, name, status.st_size, status.st_mtime_ns, pa.schema(plain), groups)


def _check_texts(source: Input, column: str) -> None:
    """See that a column holds texts, as far as that is known without reading them all.

    Raises:
        DataError: it does not.
    """
    kind = source.schema.field(column).type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if source.rows and not is_text and not pa.types.is_null(kind):
        raise DataError(
            f"{source.path}: column {column!r} holds {kind}, not text; name the column of the text, or save it as text"
        )
    if not _may_lack_texts(source, column):
        return
    row = 0
    for start, stop in source.parts(100_000):
        for table in source.tables(start, stop, 100_000):
            missing = pc.index(pc.is_null(table.column(column)), True).as_py()
            if missing >= 0:
                raise DataError(
                    f"{source.place(row + missing)}: column {column!r} holds no text; complete or remove the row"
                )
            row += len(table)


def _may_lack_texts(source: Input, column: str) -> bool:
    """Whether the file says that it has nulls; where it says nothing they show when it is their turn."""
    if not _is_parquet(source.path):
        return bool(_prepared(source.path, source.size, source.mtime_ns).data.data.column(column).null_count)
    metadata = pq.read_metadata(source.path)
    for group in range(metadata.num_row_groups):
        chunks = (metadata.row_group(group).column(i) for i in range(metadata.num_columns))
        statistics = next((chunk.statistics for chunk in chunks if chunk.path_in_schema == column), None)
        if statistics is not None and statistics.has_null_count and statistics.null_count:
            return True
    return False


def _common_schema(inputs: Sequence[Input]) -> pa.Schema:
    """One schema for all, in the first one's order, so that what becomes of the files can be read as one table."""
    first, common = inputs[0], inputs[0].schema
    for source in inputs[1:]:
        differing = sorted(set(first.schema.names) ^ set(source.schema.names))
        if not differing:
            try:
                ordered = pa.schema([source.schema.field(name) for name in common.names])
                common = pa.unify_schemas([common, ordered], promote_options="permissive")
                continue
            except pa.ArrowException:
                own = source.schema
                differing = [name for name in own.names if own.field(name).type != common.field(name).type]
        raise DataError(
            f"{first.path} and {source.path}: the columns {', '.join(map(repr, differing))} differ in name or type, so that no "
            "one table could hold both; give all files the same columns, or label them into two folders"
        )
    return common

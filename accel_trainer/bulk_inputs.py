"""The files that are to be labelled, each with its rows in parts that memory and a bad day can bear.

Parquet files are read as they lie, row group by row group. Others are turned into Arrow files in the cache of `datasets`
first, as for training, so that any row of theirs is found without reading those before it.
"""

from __future__ import annotations

import glob
import hashlib
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from accel_trainer.data_file import DAMAGE, NoRows
from accel_trainer.errors import DataError, UserError
from accel_trainer.file_names import KNOWN, extensions, is_data_file
from accel_trainer.tables import READER, damaged, open_prepared, prepared_folder, read_files
from accel_trainer.writing import replaced

BUFFER = 2**20  # bytes of a column that are read at a time
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


def _named(paths: Sequence[Path], output: Path) -> dict[str, Path]:
    named: dict[str, Path] = {}
    one_folder: dict[str, str] = {}  # names, by what a file system that tells few apart makes of them
    one_file: dict[Path, Path] = {}
    for path in paths:
        _check_file(path)
        name, real = output_name(path), _real(path)
        other = one_file.setdefault(real, path)
        if other != path:
            raise UserError(
                f"--input {other} and {path}: both are links to {real}, or one is, so that its rows would be labelled twice; "
                "name one of them, or put a copy in its place"
            )
        alike = one_folder.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if alike in named:
            same = "" if alike == name else f", which on some systems is {output / alike}"
            raise UserError(
                f"--input {named[alike]} and {path}: both would be labelled into {output / name}{same}; rename one of them, or "
                "label them into two folders"
            )
        named[name] = path
    # As readers of the output sort the paths in it, so that they find the rows in this order.
    return {name: named[name] for name in sorted(named, key=lambda name: f"{name}/")}


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
    common = _common_schema([source for source in inputs if source.schema.names])
    return [Input(s.path, s.name, s.size, s.mtime_ns, common, s.groups) for s in inputs]


def _read_input(path: Path, name: str) -> Input:
    try:
        status = path.stat()
        if _is_parquet(path):
            with pq.ParquetFile(path) as file:
                metadata, whole = file.metadata, file.schema_arrow
                groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        else:
            rows = _prepared_data(path, status.st_size, status.st_mtime_ns)
            whole, groups = rows.features.arrow_schema, (len(rows),)
    except NoRows as empty:
        whole, groups = pa.schema([(column, pa.null()) for column in empty.columns]), (0,)
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
    if not source.rows:
        return
    kind = source.schema.field(column).type
    if not _is_text(kind) and not pa.types.is_null(kind):
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


def _common_schema(inputs: Sequence[Input]) -> pa.Schema:
    """One schema for all, in the first one's order, so that what becomes of the files can be read as one table."""
    first, common = inputs[0], inputs[0].schema
    for source in inputs[1:]:
        differing = sorted(set(first.schema.names) ^ set(source.schema.names))
        if not differing:
            wider = {field.name: _wider(field.type, source.schema.field(field.name).type) for field in common}
            differing = [name for name, kind in wider.items() if kind is None]
            common = pa.schema([(name, kind or common.field(name).type) for name, kind in wider.items()])
        if differing:
            raise DataError(
                f"{first.path} and {source.path}: the columns {', '.join(map(repr, differing))} differ in name or type, so that "
                "no one table could hold both; give all files the same columns, or label them into two folders"
            )
    return common


def _wider(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both as they are, whatever they are; None if there is none."""
    kinds = [pa.schema([("column", kind)]) for kind in (one, other)]
    try:
        common = pa.unify_schemas(kinds, promote_options="permissive")
        for kind in kinds:
            kind.empty_table().cast(common)  # raises here, not when it is the rows' turn
    except (pa.ArrowException, NotImplementedError):
        return None
    wide = common.field("column").type
    return wide if _holds(wide, one) and _holds(wide, other) else None


def _holds(wide: pa.DataType, kind: pa.DataType) -> bool:
    """Whether every value of a type is one of another, to which Arrow turns it."""
    types = pa.types
    if kind == wide or types.is_null(kind):
        return True
    if types.is_integer(kind) and types.is_integer(wide):
        digits = [one.bit_width - types.is_signed_integer(one) for one in (wide, kind)]
        return bool(digits[0] >= digits[1] and (types.is_signed_integer(wide) or types.is_unsigned_integer(kind)))
    if types.is_floating(kind) and types.is_floating(wide):
        return bool(wide.bit_width >= kind.bit_width)
    if _is_list(kind) and _is_list(wide):
        return _holds(wide.value_type, kind.value_type)
    if types.is_struct(kind) and types.is_struct(wide):
        return all(_holds(wide.field(field.name).type, field.type) for field in kind)
    return _is_text(kind) and _is_text(wide)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))

"""Files of labelled rows, .csv, .tsv, .jsonl or .parquet, each of which appears under its name when it is complete.

    with open_writer(Path("labelled.csv"), ["bad", "good"], schema) as writer:
        writer.write(rows, ["good", …], shares)

The columns of the input come first, as they were; then `prediction`, and the probability of every label.
"""

from __future__ import annotations

import base64
import csv
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from accel_trainer.errors import UserError
from accel_trainer.writing import replaced

Shares = npt.NDArray[np.float64]  # probabilities of some rows, (rows, num_labels)


def carried_columns(names: Sequence[str], label_names: Sequence[str]) -> list[str]:
    """Columns that a labelled file keeps: all but those that labelling adds, for a labelled file may be labelled again."""
    added = {"prediction", "probabilities", *(f"probability_{name}" for name in label_names)}
    return [name for name in names if name not in added]


class Writer(Protocol):
    """Takes rows of one schema, chunk by chunk."""

    defused: int  # cells, column names included, that were marked as text for spreadsheets
    first_defused: tuple[int, str] | None  # its row, of those written, -1 for the column names; and its column

    def write(self, rows: pa.Table, labels: Sequence[str], shares: Shares) -> None:
        """Append rows with the predicted label's name and every label's probability."""


# What makes a spreadsheet read a cell as a formula; tab and carriage return it skips before it looks.
_FORMULA = re.compile(r"[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def _defused(cell: Any) -> Any:
    """A cell that no spreadsheet runs: text that begins like a formula, and is no number, after an apostrophe."""
    if isinstance(cell, str) and _FORMULA.match(cell) and not _NUMBER.fullmatch(cell):
        return f"'{cell}"
    return cell


def _plain(value: Any) -> str:
    """A value that JSON has no kind for, as text; bytes as base64."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _without_nan(value: Any) -> Any:
    """The value with null for the numbers that JSON does not have, NaN and the infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    return [_without_nan(one) for one in value] if isinstance(value, list | tuple) else value


def _json(record: dict[str, Any]) -> str:
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:
        return json.dumps(_without_nan(record), ensure_ascii=False, default=_plain)


class _Jsonl:
    defused = 0
    first_defused: tuple[int, str] | None = None

    def __init__(self, file: Any, label_names: Sequence[str]) -> None:
        self._file, self._label_names = file, label_names

    def write(self, rows: pa.Table, labels: Sequence[str], shares: Shares) -> None:
        for row, label, row_shares in zip(rows.to_pylist(), labels, shares.tolist(), strict=True):
            named = dict(zip(self._label_names, row_shares, strict=True))
            record = {**row, "prediction": label, "probabilities": named}
            self._file.write(_json(record) + "\n")


class _Csv:
    def __init__(self, file: Any, delimiter: str, columns: Sequence[str], *, keep_formulas: bool) -> None:
        self.defused = 0
        self.first_defused: tuple[int, str] | None = None
        self._columns, self._row = columns, -1  # that comes next
        self._keep_formulas = keep_formulas
        # "\r\n", because the module leaves a lone "\r" in a cell unquoted under any other line end.
        self._writer = csv.writer(file, delimiter=delimiter, lineterminator="\r\n")
        self._write(columns)

    def write(self, rows: pa.Table, labels: Sequence[str], shares: Shares) -> None:
        columns = [column.to_pylist() for column in rows.columns]
        for *cells, label, row_shares in zip(*columns, labels, shares.tolist(), strict=True):
            self._write([*(_plain(c) if isinstance(c, bytes) else c for c in cells), label, *row_shares])

    def _write(self, cells: Sequence[Any]) -> None:
        if not self._keep_formulas:
            plain, cells = cells, [_defused(cell) for cell in cells]
            marked = [i for i, (one, other) in enumerate(zip(plain, cells, strict=True)) if one is not other]
            if marked and not self.defused:
                self.first_defused = self._row, self._columns[marked[0]]
            self.defused += len(marked)
        self._row += 1
        self._writer.writerow(cells)


class _Parquet:
    defused = 0
    first_defused: tuple[int, str] | None = None

    def __init__(self, writer: pyarrow.parquet.ParquetWriter, label_names: Sequence[str]) -> None:
        self._writer, self._label_names = writer, label_names

    def write(self, rows: pa.Table, labels: Sequence[str], shares: Shares) -> None:
        by_label = [pa.array(np.ascontiguousarray(column)) for column in shares.T]
        added = [pa.array(labels, pa.string()), pa.StructArray.from_arrays(by_label, list(self._label_names))]
        self._writer.write_table(pa.Table.from_arrays([*rows.columns, *added], schema=self._writer.schema))


@contextmanager
def open_writer(
    target: Path, label_names: Sequence[str], schema: pa.Schema, *, keep_formulas: bool = False
) -> Iterator[Writer]:
    """A writer for `target`, which appears under its name when the block ends well.

    Args:
        target: .csv, .tsv, .jsonl or .parquet.
        label_names: names by class id.
        schema: of the rows that will be written, in which no column is named like those that are added.
        keep_formulas: leave text in .csv and .tsv as it is, whatever a spreadsheet makes of it.

    Raises:
        UserError: the suffix is unknown, or the file cannot be written.
    """
    suffix = target.suffix.lower()
    if suffix not in (".csv", ".tsv", ".jsonl", ".parquet"):
        raise UserError(f"--output {target}: unknown kind of file {suffix!r}; end it in .csv, .tsv, .jsonl or .parquet")
    try:
        with replaced(target) as writing:
            if suffix == ".parquet":
                shares = pa.struct([(name, pa.float64()) for name in label_names])
                added = [pa.field("prediction", pa.string()), pa.field("probabilities", shares)]
                with pyarrow.parquet.ParquetWriter(writing, pa.schema([*schema, *added])) as parquet:
                    yield _Parquet(parquet, label_names)
            else:
                with writing.open("w", encoding="utf-8", newline="" if suffix != ".jsonl" else None) as file:
                    names = [*schema.names, "prediction", *(f"probability_{name}" for name in label_names)]
                    if suffix == ".jsonl":
                        yield _Jsonl(file, label_names)
                    else:
                        yield _Csv(file, "," if suffix == ".csv" else "\t", names, keep_formulas=keep_formulas)
    except OSError as error:
        raise UserError(f"--output {target}: {error.strerror or error}; make space, or write elsewhere") from error

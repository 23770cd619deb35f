"""The rows of one role, read once for `findings`: label ids, hashes of the texts, and tallies of what single texts show.

Of a text nothing is kept but numbers, some 50 bytes, so that a million rows fit anywhere.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from accel_trainer.data import check_column, label_cells, mapping
from accel_trainer.labels import UNLABELLED, Labels, guesses, match_labels
from accel_trainer.order import Rows as RowNumbers
from accel_trainer.recipe import DatasetSection
from accel_trainer.sources import Table
from accel_trainer.text_faults import TEXT_FAULTS, excerpt, text_faults

UNKNOWN = -2  # the class id of a label that is none
ROWS_AT_ONCE = 1000
EXAMPLES = 3  # rows shown of a finding
BEGINNING = 8  # characters by which texts are said to begin alike


@dataclass(frozen=True)
class Example:
    """A row that shows a finding."""

    place: str  # file and row, counted from 1; of two rows, both
    text: str  # an excerpt


@dataclass
class Tally:
    """Rows that show one kind of thing: how many, and the first of them with an excerpt."""

    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)

    def add(self, row: int, text: str, position: int = 0) -> None:
        """Count a row; the excerpt of its text lies around the position."""
        self.count += 1
        if len(self.first) < EXAMPLES:
            self.first.append((row, excerpt(text, position)))


@dataclass
class Scan:
    """One role, read once. Legend: n rows, in order."""

    section: DatasetSection
    role: str
    table: Table
    rows: RowNumbers  # (n,) of the table
    label_names: list[str]
    labels: Labels  # (n,) class ids, UNLABELLED or UNKNOWN
    strays: dict[str, list[int]]  # value that is no label → its rows
    guessed: dict[str, str]  # value → the name it was read as, where it is none as it stands
    integers: set[int]  # the distinct cells, if all are integers
    keys: npt.NDArray[np.uint64]  # (n,) hash of the text, or of both texts; 0 where one is missing
    beginnings: npt.NDArray[np.uint32]  # (n,) hash of the first characters
    characters: int = 0
    faults: list[Tally] = field(default_factory=lambda: [Tally() for _ in TEXT_FAULTS])  # as TEXT_FAULTS
    missing: Tally = field(default_factory=Tally)
    equal_pairs: Tally = field(default_factory=Tally)
    is_label: Tally = field(default_factory=Tally)  # the text is the name of a label
    has_label: Tally = field(default_factory=Tally)  # it begins or ends with the name of its own

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, row: int) -> str:
        """File and row of one of these rows."""
        return self.table.place(int(self.rows[row]))

    def text(self, row: int) -> str:
        """The text of one of these rows."""
        return str(self.table.data[int(self.rows[row])][self.section.text_column])

    def example(self, row: int, *, more: str = "") -> Example:
        """One of these rows to be shown, with `more` about its place."""
        return Example(self.place(row) + more, excerpt(self.text(row)))

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Labelled rows by class id, (num_labels,)."""
        return np.bincount(self.labels[self.labels >= 0], minlength=len(self.label_names))

    @property
    def unlabelled(self) -> npt.NDArray[np.int64]:
        """The rows that have no label."""
        return np.flatnonzero(self.labels == UNLABELLED)

    def batches(self) -> Iterator[tuple[int, list[list[Any]]]]:
        """First row, and the columns of texts, of each batch."""
        data = self.table.data.select(self.rows).select_columns(self.section.text_columns)
        for i, batch in enumerate(data.iter(ROWS_AT_ONCE)):
            yield i * ROWS_AT_ONCE, [batch[column] for column in self.section.text_columns]


def scan_role(section: DatasetSection, role: str, table: Table, rows: RowNumbers, label_names: list[str]) -> Scan:
    """Read labels and texts of a role.

    Raises:
        DataError: a column is missing.
    """
    for column in section.text_columns:
        check_column(section, table, column)
    cells = label_cells(section, role, table, rows, label_names)
    keys, matched = match_labels(cells, label_names, mapping(section))
    ids: dict[str | int | None, int] = {key: UNKNOWN if i is None else i for key, i in matched.items()}
    ids[None] = UNLABELLED
    labels = np.asarray([ids[key] for key in keys], dtype=np.int64)
    strays: dict[str, list[int]] = {}
    for row in np.flatnonzero(labels == UNKNOWN).tolist():
        strays.setdefault(str(keys[row]), []).append(row)
    integers = {int(key) for key in matched if isinstance(key, int) or key.isdecimal()}
    scan = Scan(
        section=section,
        role=role,
        table=table,
        rows=rows,
        label_names=label_names,
        labels=labels,
        strays=strays,
        guessed=guesses(matched, label_names) if mapping(section) is None else {},
        integers=integers if len(integers) == len(matched) else set(),
        keys=np.zeros(len(rows), np.uint64),
        beginnings=np.zeros(len(rows), np.uint32),
    )
    _read_texts(scan)
    return scan


def _read_texts(scan: Scan) -> None:
    names = [name.casefold() for name in scan.label_names]
    known = frozenset(names)  # of which there may be thousands
    for start, columns in scan.batches():
        for row, texts in enumerate(zip(*columns, strict=True), start):
            present = [text for text in texts if isinstance(text, str) and text.strip()]
            if len(present) < len(texts):
                scan.missing.add(row, "".join(present))
                continue
            scan.keys[row] = _key(present)
            scan.beginnings[row] = zlib.crc32(present[0][:BEGINNING].encode())
            scan.characters += sum(map(len, present))
            _look_at(scan, row, present, names, known)


def _look_at(scan: Scan, row: int, texts: list[str], names: list[str], known: frozenset[str]) -> None:
    seen: set[int] = set()
    for text in texts:
        for i, position in text_faults(text):
            if i not in seen:
                seen.add(i)
                scan.faults[i].add(row, text, position)
    if len(texts) == 2 and texts[0] == texts[1]:
        scan.equal_pairs.add(row, texts[0])
    plain = texts[0].strip().casefold()
    own = names[scan.labels[row]] if scan.labels[row] >= 0 else ""
    if plain in known:
        scan.is_label.add(row, texts[0])
    elif len(own) > 1 and not own.isdecimal() and (plain.startswith(own) or plain.endswith(own)):
        scan.has_label.add(row, texts[0], 0 if plain.startswith(own) else len(texts[0]))


def _key(texts: Iterable[str]) -> int:
    """A number that stands for the texts, never 0; two of a million texts share theirs with a chance of 1 in 10^7."""
    digest = hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) or 1

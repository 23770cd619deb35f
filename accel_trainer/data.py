"""From a recipe's `dataset` to tokenised, labelled splits.

    read_source ─▶ raw tables ─▶ roles (slices, or stratified draws) ─▶ label ids ─▶ checks ─▶ tokens, cached

Everything a result depends on is a function of the rows and the recipe: shuffles and draws are keyed permutations, not
a library's random stream.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import repeat
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from accel_trainer import order
from accel_trainer.errors import DataError
from accel_trainer.labels import UNLABELLED, Labels, infer_names, label_ids, match_labels, rare_classes, same_spelling
from accel_trainer.recipe import DatasetSection
from accel_trainer.sources import Source, Table, read_source
from accel_trainer.splits import parse_slices
from accel_trainer.tokenization import Tokens, cached_tokens

SMALLEST_JUDGED_SPLIT = 20  # in fewer rows than this, a single class is bad luck rather than a mistake


@dataclass(frozen=True)
class Selection:
    """Which rows play which role, before texts and labels are checked."""

    roles: dict[str, tuple[Table, order.Rows]]  # a table, and which of its rows, in order
    label_names: list[str]
    revision: str | None  # commit of a Hub dataset
    notes: list[str]  # on the classes, where the rows name them


@dataclass(frozen=True)
class Rows:
    """The rows of one role, in order, before they become tokens."""

    role: str  # train, validation, test
    table: datasets.Dataset
    labels: Labels  # (rows,) class ids, -1 where unlabelled
    place: Callable[[int], str]  # names file and row of one of these rows
    sha256: str  # of texts, second texts and labels, in order

    def __len__(self) -> int:
        return len(self.table)

    @property
    def is_labelled(self) -> bool:
        """Whether the rows can be scored; a test split without labels is for prediction only."""
        return len(self) > 0 and bool((self.labels != UNLABELLED).all())

    def texts(self, section: DatasetSection, batch_size: int = 1000) -> Iterator[tuple[list[str], list[str] | None]]:
        """Texts and second texts in batches, in order."""
        columns = section.text_columns
        for batch in self.table.select_columns(columns).iter(batch_size):
            yield batch[section.text_column], batch[section.text_pair_column] if section.text_pair_column else None


@dataclass(frozen=True)
class LabelledData:
    """All roles of a recipe, with the names of the classes."""

    roles: dict[str, Rows]
    label_names: list[str]
    revision: str | None  # commit of a Hub dataset
    notes: list[str]  # what a careful person should know, worded for people


@dataclass(frozen=True)
class Split:
    """The rows of one role, with their tokens."""

    rows: Rows
    tokens: Tokens

    def __len__(self) -> int:
        return len(self.rows)


def load_labelled(section: DatasetSection) -> LabelledData:
    """Read the data a recipe names, give every row its role and label, and check what can be checked.

    Raises:
        DataError: the data do not fit the recipe; the message names file and row, or how many rows.
    """
    selection = select_rows(section)
    names, notes = selection.label_names, list(selection.notes)
    roles = {
        role: rows_of_role(section, role, table, rows, names, notes) for role, (table, rows) in selection.roles.items()
    }
    _check_roles(roles, names, notes)
    notes.extend(_shared_texts(section, roles))
    _check_locked(section, roles)
    return LabelledData(roles, names, selection.revision, notes)


def select_rows(section: DatasetSection) -> Selection:
    """Read the data a recipe names, and give every row its role.

    Raises:
        DataError: the data cannot be read, or the roles cannot be taken from them.
    """
    sources = section.splits.roles()
    named = all(isinstance(source, str) for source in sources.values())
    wanted = {piece.name for source in sources.values() for piece in parse_slices(str(source))} if named else None
    source = read_source(section, wanted)
    selected = _slice_roles(section, source) if named else _draw_roles(section, source)
    names = _label_names(section, selected)
    notes = _notes_on_classes(section, *selected["train"], names)
    capped = {role: (table, _capped(section, role, rows)) for role, (table, rows) in selected.items()}
    return Selection(capped, names, source.revision, notes)


def _slice_roles(section: DatasetSection, source: Source) -> dict[str, tuple[Table, order.Rows]]:
    """Rows of each role out of the source splits, shuffled before slicing where the recipe says so."""
    taken: dict[str, list[tuple[str, range]]] = {}
    used: dict[str, tuple[str, Table]] = {}
    roles = {}
    for role, expression in section.splits.roles().items():
        tables, rows, offset = [], [], 0
        for piece in parse_slices(str(expression)):
            if piece.name not in source.tables:
                close = get_close_matches(piece.name, source.tables, n=1)
                raise DataError(
                    f"dataset.splits.{role}: there is no split {piece.name!r} in {_source_name(section)}"
                    f"{f' (did you mean {close[0]!r}?)' if close else ''}; it has {', '.join(source.tables)}"
                )
            table = source.tables[piece.name]
            n = len(table.data)
            start, stop = piece.bounds(n)
            if start == stop:
                raise DataError(
                    f"dataset.splits.{role}: {piece} is empty, the split {piece.name!r} has {n} rows; choose a slice within it"
                )
            for other, ranges in taken.items():
                for name, held in ranges:
                    if name == piece.name and max(start, held.start) < min(stop, held.stop):
                        shared = f"{piece.name}[{max(start, held.start)}:{min(stop, held.stop)}]"
                        raise DataError(f"dataset.splits: {role} and {other} share {shared}; give each row one role")
            taken.setdefault(role, []).append((piece.name, range(start, stop)))
            everything = np.arange(n) if section.shuffle_seed is None else order.shuffled(n, section.shuffle_seed)
            used.setdefault(piece.name, (role, table))
            tables.append(table)
            rows.append(everything[start:stop] + offset)
            offset += n
        roles[role] = (_joined(role, tables), np.concatenate(rows))
    _check_files(used)
    return roles


def _joined(role: str, tables: list[Table]) -> Table:
    if len(tables) == 1:
        return tables[0]
    try:
        data = datasets.concatenate_datasets([table.data for table in tables])
    except ValueError as error:  # it names the column and the types
        raise DataError(
            f"dataset.splits.{role}: {' and '.join(table.origins[0].name for table in tables)} do not go together: {error}; "
            "give the columns the same types"
        ) from error
    return Table(data, tuple(origin for table in tables for origin in table.origins))


def _check_files(used: dict[str, tuple[str, Table]]) -> None:
    """One file under two split names would give the same rows twice without any range overlapping.

    Args:
        used: source split → the first role that takes rows of it, and its table.
    """
    holder: dict[str, tuple[str, str]] = {}
    for split, (role, table) in used.items():
        for origin in table.origins:
            file = origin.name if "://" in origin.name else str(Path(origin.name).resolve())
            other_split, other = holder.setdefault(file, (split, role))
            if other_split != split:
                raise DataError(
                    f"dataset.data_files: {other} and {role} both read {origin.name}, as the splits {other_split!r} and "
                    f"{split!r}; give each role files of its own, or slice one split"
                )


def _draw_roles(section: DatasetSection, source: Source) -> dict[str, tuple[Table, order.Rows]]:
    """Seeded, stratified draws from the one table there is; shares of it, or numbers of rows."""
    if len(source.tables) > 1:
        raise DataError(
            f"dataset.splits: shares are drawn from one table, but {_source_name(section)} has the splits "
            f"{', '.join(source.tables)}; name them, as in `train: train[:90%]`"
        )
    table = next(iter(source.tables.values()))
    n = len(table.data)
    if n == 0:  # a Parquet or Arrow file may be; the text formats are refused where they are read
        raise DataError(f"{table.origins[0].name}: there are columns and no rows; add rows")
    sizes = section.splits.roles()
    bounds, total = [0], 0.0
    for size in sizes.values():
        assert not isinstance(size, str)
        total += size * n if isinstance(size, float) else size
        bounds.append(round(total))
    if bounds[-1] > n:
        raise DataError(
            f"dataset.splits: {bounds[-1]} rows are asked for, {_source_name(section)} has {n}; ask for fewer"
        )
    names = _label_names(section, {"train": (table, np.arange(n))})
    values = label_cells(section, "train", table, np.arange(n), names)
    keys, matched = match_labels(values, names, mapping(section))  # what has no class is told role by role
    classes = [None if key is None else matched[key] for key in keys]
    labels = np.asarray([UNLABELLED if class_id is None else class_id for class_id in classes])
    drawn = order.stratified(labels, section.draw_seed)
    roles = {}
    for role, start, stop in zip(sizes, bounds, bounds[1:], strict=False):
        if start == stop:
            raise DataError(f"dataset.splits.{role}: {sizes[role]} of {n} rows is no row; give it a larger share")
        roles[role] = (table, np.sort(drawn[start:stop]))
    return roles


def _capped(section: DatasetSection, role: str, rows: order.Rows) -> order.Rows:
    caps = {
        "train": section.max_train_samples,
        "validation": section.max_eval_samples,
        "test": section.max_predict_samples,
    }
    cap = caps[role]
    return rows if cap is None else rows[order.subset(len(rows), cap, section.draw_seed)]


def mapping(section: DatasetSection) -> dict[str, str] | None:
    """The recipe's {value in the file: name}, where it gives one."""
    return section.labels if isinstance(section.labels, dict) else None


def _source_name(section: DatasetSection) -> str:
    return section.path or "dataset.data_files"


def _column(section: DatasetSection, role: str, table: Table, rows: order.Rows, column: str) -> list[Any]:
    """Cells of one column in the order of `rows`; a test split may lack its label column."""
    if role == "test" and column == section.label_column and column not in table.data.column_names:
        return [None] * len(rows)
    check_column(section, table, column)
    cells: list[Any] = (
        table.data.select_columns([column]).with_format("arrow")[:][column].take(pa.array(rows)).to_pylist()
    )
    return cells


def check_column(section: DatasetSection, table: Table, column: str) -> None:
    """See that the table has a column that the recipe names.

    Raises:
        DataError: it has not; the message names the nearest.
    """
    if column not in table.data.column_names:
        close = get_close_matches(column, table.data.column_names, n=1)
        key = {
            section.text_column: "text_column",
            section.text_pair_column: "text_pair_column",
            section.label_column: "label_column",
        }[column]
        raise DataError(
            f"dataset.{key}: {table.origins[0].name} has no column {column!r}"
            f"{f' (did you mean {close[0]!r}?)' if close else ''}; it has {', '.join(table.data.column_names)}"
        )


def _label_names(section: DatasetSection, roles: dict[str, tuple[Table, order.Rows]]) -> list[str]:
    """Names of the classes: the recipe's, or the data's own, or the distinct values of the training split."""
    given = section.label_names()
    table, rows = roles["train"]
    values = _column(section, "train", table, rows, section.label_column)
    feature = table.data.features[section.label_column]
    if isinstance(feature, datasets.ClassLabel):
        if given is not None and len(given) != feature.num_classes and isinstance(section.labels, list):
            raise DataError(
                f"dataset.labels: {len(given)} names, but the data have {feature.num_classes} classes "
                f"({', '.join(feature.names[:20])}); name each, in that order"
            )
        return given or list(feature.names)
    found = given or infer_names(values, section.label_column)
    if not found:
        raise DataError(
            f"{table.place(int(rows[0]))}: none of the {len(rows)} train rows has a label; label them, or set "
            "dataset.label_column to the column of the labels"
        )
    if len(found) == 1:  # said here, or the other classes of the other roles would be called unknown
        raise _one_class("train", len(rows), found[0])
    return found


def _notes_on_classes(section: DatasetSection, table: Table, rows: order.Rows, names: list[str]) -> list[str]:
    """What looks like a misspelling among classes that are but the distinct values of the training split."""
    inferred = section.labels is None and not isinstance(table.data.features[section.label_column], datasets.ClassLabel)
    if not inferred:
        return []
    labels, _ = label_ids(label_cells(section, "train", table, rows, names), names, None, table.place)
    counts = np.bincount(labels[labels != UNLABELLED], minlength=len(names)).tolist()
    stray = [f"{names[i]!r} ({counts[i]} row{'s' if counts[i] > 1 else ''})" for i in rare_classes(counts)]
    alike = [f"{one!r} and {other!r}" for one, other in same_spelling(names)]
    said = [f"there are few rows of {', '.join(stray[:10])}"] if stray else []
    said += [f"these differ in spelling only: {', '.join(alike[:10])}"] if alike else []
    return [
        f"train: every distinct label is a class, {len(names)} in all; {what}; mend the rows, or list the classes in "
        "dataset.labels"
        for what in said
    ]


def _one_class(role: str, count: int, name: str) -> DataError:
    return DataError(
        f"dataset.splits.{role}: all {count} rows have the label {name!r}; where a file is sorted by label, set "
        "dataset.shuffle_seed, or choose other rows"
    )


def label_cells(section: DatasetSection, role: str, table: Table, rows: order.Rows, names: list[str]) -> list[Any]:
    """Cells of the label column; where the data name their classes, ids become names, so that none is read twice."""
    cells = _column(section, role, table, rows, section.label_column)
    feature = table.data.features.get(section.label_column)
    if not isinstance(feature, datasets.ClassLabel) or mapping(section) is not None:
        return cells
    own = names if section.labels is not None else feature.names
    return [own[cell] if cell is not None and 0 <= cell < len(own) else cell for cell in cells]


def rows_of_role(
    section: DatasetSection, role: str, table: Table, rows: order.Rows, names: list[str], notes: list[str]
) -> Rows:
    """The rows of one role with their labels and hash, every text checked.

    Args:
        section: names columns and labels.
        role: train, validation or test; only a test split may lack labels.
        table: where the rows stand.
        rows: which of them, in order.
        names: label names by class id.
        notes: what is worth telling is added here.

    Raises:
        DataError: a text is missing, or a label is unknown.
    """

    def place(row: int) -> str:
        return table.place(int(rows[row]))

    values = label_cells(section, role, table, rows, names)
    labels, guessed = label_ids(values, names, mapping(section), place)
    notes.extend(note_on_guesses(role, guessed))
    texts = _texts(section, role, table, rows, section.text_column, place)
    pairs = _texts(section, role, table, rows, section.text_pair_column, place) if section.text_pair_column else None
    digest = hashlib.sha256()
    for start in range(0, len(rows), 1000):
        window = slice(start, start + 1000)
        record = [texts[window], pairs[window] if pairs else None, labels[window].tolist()]
        digest.update(json.dumps(record, ensure_ascii=True).encode())
    return Rows(role, table.data.select(rows), labels, place, digest.hexdigest())


def note_on_guesses(role: str, guessed: dict[str, str]) -> list[str]:
    """How labels were read that are no names as they stand; nothing where there is none."""
    readings = ", ".join(f"{value} → {name}" for value, name in guessed.items())
    return [f"{role}: labels read as {readings}; dataset.labels can say so explicitly"] if guessed else []


def _texts(
    section: DatasetSection, role: str, table: Table, rows: order.Rows, column: str, place: Callable[[int], str]
) -> list[str]:
    """One text column, with no cell null or blank."""
    texts = _column(section, role, table, rows, column)
    missing = [row for row, text in enumerate(texts) if text is None or not str(text).strip()]
    if missing:
        more = f" and {len(missing) - 1} more row{'s' if len(missing) > 2 else ''}" if len(missing) > 1 else ""
        raise DataError(f"{place(missing[0])}{more}: column {column!r} holds no text; remove or complete the rows")
    strange = next((row for row, text in enumerate(texts) if not isinstance(text, str)), None)
    if strange is not None:
        raise DataError(
            f"{place(strange)}: column {column!r} holds {type(texts[strange]).__name__}, not text; "
            "set dataset.text_column to the column of the text"
        )
    return texts


def _check_roles(roles: dict[str, Rows], names: list[str], notes: list[str]) -> None:
    for role, rows in roles.items():
        unlabelled = np.flatnonzero(rows.labels == UNLABELLED)
        if len(unlabelled) and (role != "test" or len(unlabelled) < len(rows)):
            raise DataError(
                f"{rows.place(int(unlabelled[0]))}: {len(unlabelled)} of {len(rows)} {role} rows have no label; "
                "label or remove them (only a test split may be unlabelled, and then wholly)"
            )
        if len(unlabelled):
            notes.append(f"{role}: the {len(rows)} rows have no labels, so they are predicted and not scored")
            continue
        present = np.unique(rows.labels)
        if len(present) == 1 and (role == "train" or (role == "validation" and len(rows) >= SMALLEST_JUDGED_SPLIT)):
            raise _one_class(role, len(rows), names[int(present[0])])
        absent = [name for i, name in enumerate(names) if i not in present]
        if absent:
            notes.append(f"{role}: no row has the label {', '.join(absent[:10])}")


def _shared_texts(section: DatasetSection, roles: dict[str, Rows]) -> list[str]:
    """Counts of texts that stand in the training split and in another one."""
    if "train" not in roles or len(roles) < 2:
        return []

    def keys(rows: Rows) -> set[tuple[str, str | None]]:
        return {
            (text, pair)
            for texts, pairs in rows.texts(section)
            for text, pair in zip(texts, pairs or repeat(None), strict=pairs is not None)
        }

    training = keys(roles["train"])
    notes = []
    for role, rows in roles.items():
        if role != "train" and (shared := len(training & keys(rows))):
            notes.append(
                f"{role}: {shared} text{'s' if shared > 1 else ''} of it also in train; its score flatters a little"
            )
    return notes


def _check_locked(section: DatasetSection, roles: dict[str, Rows]) -> None:
    for role, expected in (section.sha256 or {}).items():
        found = roles[role].sha256 if role in roles else None
        if found != expected:
            raise DataError(
                f"dataset.sha256.{role}: the recipe was locked to other rows ({expected[:12]}…, found "
                f"{found[:12] + '…' if found else 'no such split'}); bring those data back, or unlock by removing the key"
            )


def tokenise(rows: Rows, section: DatasetSection, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Split:
    """Tokenise one role, once for all runs that share its rows, tokenizer and maximum length.

    Raises:
        DataError: the cache folder cannot be written.
    """
    columns = section.text_columns
    return Split(rows, cached_tokens(rows.table.select_columns(columns), rows.sha256, tokenizer, max_length))

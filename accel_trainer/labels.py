"""Labels: from what stands in a file to class ids 0, 1, … and names, or to one clear message."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import numpy.typing as npt

from accel_trainer.errors import DataError

UNLABELLED = -1
Labels = npt.NDArray[np.int64]

# More classes than this, and nearly as many as rows: the column holds something else than labels.
MOST_INFERRED_CLASSES = 1000
FEW_ROWS, TYPICAL_ROWS = 2, 20  # of a stray class, and of the classes that most rows are of
MOST_DIGITS = 1000  # of text that is read as a number; Python refuses to convert much more


def is_unlabelled(value: Any) -> bool:
    """Whether a cell says "no label": null, nothing, NaN, or -1 as the public benchmarks write it for hidden labels."""
    if isinstance(value, str):
        return value.strip() in ("", str(UNLABELLED))
    return (
        value is None or bool(value == UNLABELLED) or (isinstance(value, float | np.floating) and bool(np.isnan(value)))
    )


def canonical(value: Any) -> str | int:
    """A cell as an integer where it is one (1, 1.0, True), else as stripped text."""
    if isinstance(value, bool | np.bool_):
        return int(value)
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return int(value)
    if isinstance(value, int | np.integer):
        return int(value)
    return str(value).strip()


def _as_integer(value: str | int) -> int | None:
    if isinstance(value, int):
        return value
    return int(value) if value.isascii() and value.isdigit() and len(value) <= MOST_DIGITS else None


def rare_classes(counts: Sequence[int]) -> list[int]:
    """Classes of a row or two where most rows are of classes of twenty and more: misspellings, or too few to learn from.

    Args:
        counts: labelled rows by class id.
    """
    common = sum(count for count in counts if count >= TYPICAL_ROWS)
    return [i for i, count in enumerate(counts) if 0 < count <= FEW_ROWS and 2 * common > sum(counts)]


def same_spelling(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ in case, width, spaces, `-` and `_` only, such as `Positive` and `positive`."""
    plain: dict[str, str] = {}
    pairs = []
    for name in names:
        folded = unicodedata.normalize("NFKC", name).casefold()
        key = re.sub(r"[\s_-]", "", folded)
        if _as_integer(key) is None and plain.setdefault(key, name) != name:  # `-1` and `1` differ
            pairs.append((plain[key], name))
    return pairs


def infer_names(values: Sequence[Any], label_column: str) -> list[str]:
    """Label names where neither the recipe nor the data name them: the distinct values, sorted.

    Args:
        values: cells of the training split's label column.
        label_column: its name, for messages.

    Raises:
        DataError: there are so many that this can hardly be the label column.
    """
    distinct = {canonical(value) for value in values if not is_unlabelled(value)}
    if len(distinct) > MOST_INFERRED_CLASSES or (len(distinct) > 50 and len(distinct) > len(values) // 2):
        example = ", ".join(repr(value) for value in sorted(map(str, distinct))[:3])
        raise DataError(
            f"column {label_column!r} holds {len(distinct)} different values in {len(values)} rows ({example}, …); "
            "set dataset.label_column to the column of the labels, or list them in dataset.labels"
        )
    names = sorted(str(value) for value in distinct)
    if all(_as_integer(value) is not None for value in distinct):
        names.sort(key=int)  # 2 before 10; as written, or `01` would be no name and be taken for a class id
    return names


def _integers_are_ids(keys: Collection[str | int], names: Sequence[str]) -> bool:
    """Whether a column's integers count the classes from 0, or are names of classes themselves; never some of each.

    The ratings 1 to 5 are the names `1` to `5`; where such classes are written 0 to 4, the cell `1` is the class `2`.
    """
    integers = [integer for key in keys if (integer := _as_integer(key)) is not None]
    named = [str(key) in names for key in keys if _as_integer(key) is not None]
    return not all(named) and (not any(named) or all(0 <= integer < len(names) for integer in integers))


def _count_from_one(keys: Collection[str | int], names: Sequence[str]) -> bool:
    """Whether the distinct values are integers from 1 up to the number of classes."""
    integers = [_as_integer(key) for key in keys]
    return all(integer is not None and 1 <= integer <= len(names) for integer in integers)


def _match(value: str | int, names: Sequence[str], mapping: dict[str, str] | None, by_id: bool) -> int | None:
    """Class id of one distinct value, or None.

    A name is recognised as it is, then whatever its case, then from an abbreviation that fits it alone
    (`neg` for NEGATIVE). Integers are class ids where `by_id` says so.
    """
    if mapping is not None:
        name = mapping.get(str(value))
        return None if name is None else names.index(name)
    integer = _as_integer(value)
    if integer is not None and by_id:
        return integer if 0 <= integer < len(names) else None
    if str(value) in names:
        return names.index(str(value))
    if integer is not None:
        return None
    text = str(value).casefold()
    folded = [name.casefold() for name in names]
    same = [i for i, name in enumerate(folded) if name == text]
    longer = [i for i, name in enumerate(folded) if len(text) >= 3 and name.startswith(text)]
    return next((ids[0] for ids in (same, longer) if len(ids) == 1), None)


def match_labels(
    values: Sequence[Any], names: Sequence[str], mapping: dict[str, str] | None
) -> tuple[list[str | int | None], dict[str | int, int | None]]:
    """The cells as they are compared, None where one says "no label"; and the class id of each distinct one, or None.

    Args:
        values: cells of the label column, one a row.
        names: label names by class id.
        mapping: the recipe's {value: name}, where it gives one.
    """
    hidden = str(UNLABELLED) not in (names if mapping is None else mapping)  # else -1 is a class like any other
    keys = [
        None if is_unlabelled(value) and (hidden or str(canonical(value)) != str(UNLABELLED)) else canonical(value)
        for value in values
    ]
    distinct = dict.fromkeys(key for key in keys if key is not None)
    by_id = _integers_are_ids(distinct, names)
    return keys, {key: _match(key, names, mapping, by_id) for key in distinct}


def label_ids(
    values: Sequence[Any],
    names: Sequence[str],
    mapping: dict[str, str] | None,
    place: Callable[[int], str],
) -> tuple[Labels, dict[str, str]]:
    """Class id of every row, -1 where it has none.

    Args:
        values: cells of the label column, one a row.
        names: label names by class id.
        mapping: the recipe's {value: name}, where it gives one.
        place: names the file and row of a row, for messages.

    Returns:
        ids of shape (rows,); and {value: name} for the values that are neither a name nor an id as they stand.

    Raises:
        DataError: a value belongs to no class.
    """
    keys, matched = match_labels(values, names, mapping)
    unknown = [key for key, class_id in matched.items() if class_id is None]
    if unknown:
        key, first = unknown[0], {key: row for row, key in reversed(list(enumerate(keys))) if key is not None}
        count = sum(other == key for other in keys)
        if mapping is None and _count_from_one(first, names):
            values_to_names = ", ".join(f"{i}: {name}" for i, name in enumerate(names, 1))
            raise DataError(
                f"{place(first[key])}: label {str(key)!r}, of {len(names)} classes: the labels 1 to {len(names)} are counted "
                f"from 1, ids from 0; subtract 1, or set dataset.labels: {{{values_to_names}}}"
            )
        known = list(mapping) if mapping is not None else list(names)
        folded = {name.casefold(): name for name in known}
        close = get_close_matches(str(key).casefold(), folded, n=1)
        guess = f" (did you mean {folded[close[0]]!r}?)" if close else ""
        others = f"; {len(unknown) - 1} more unknown value{'s' if len(unknown) > 2 else ''}" if len(unknown) > 1 else ""
        raise DataError(
            f"{place(first[key])}: label {str(key)!r} is none of {', '.join(known[:20])}{guess}; it stands in {count} "
            f"row{'s' if count > 1 else ''}{others}; mend the rows, or list every label in dataset.labels"
        )
    ids = np.asarray([UNLABELLED if key is None else matched[key] for key in keys], dtype=np.int64)
    return ids, guesses(matched, names) if mapping is None else {}


def guesses(matched: dict[str | int, int | None], names: Sequence[str]) -> dict[str, str]:
    """{value: name} for the values that are neither a name nor an id as they stand."""
    return {
        str(key): names[class_id]
        for key, class_id in matched.items()
        if class_id is not None and isinstance(key, str) and not key.isdigit() and key not in names
    }

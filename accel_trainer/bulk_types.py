"""One schema for files of several, in which every value of theirs stays what it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from accel_trainer.errors import DataError
from accel_trainer.file_names import extensions


def common_schema(schemas: Mapping[Path, pa.Schema]) -> pa.Schema:
    """One schema for all files, in the first one's order, so that what becomes of them can be read as one table.

    Raises:
        DataError: there is none.
    """
    (first, common), *others = schemas.items()
    shown_by = dict.fromkeys(common.names, first)  # the file that a column has its type from
    for path, schema in others:
        differing = [f"{name!r} is in {_short(first, path)} alone" for name in common.names if name not in schema.names]
        differing += [
            f"{name!r} is in {_short(path, first)} alone" for name in schema.names if name not in common.names
        ]
        fields = []
        for field in common:
            if field.name not in schema.names:
                continue
            one, other, seen = field.type, schema.field(field.name).type, shown_by[field.name]
            wide = _wider(one, other)
            if wide is None:
                differing.append(f"{field.name!r} is {_told(one, seen, path)} and {_told(other, path, seen)}")
            elif wide != one:
                shown_by[field.name] = path
            fields.append((field.name, wide))
        if differing:
            raise DataError(
                f"{first} and {path}: {'; '.join(differing)}, so that no one table could hold both; give all files the same "
                "columns, or label them into two folders"
            )
        common = pa.schema(fields)
    return common


def _short(path: Path, other: Path) -> str:
    """A file's name, if that tells it from the other one."""
    return str(path) if path.name == other.name else path.name


def _told(kind: pa.DataType, path: Path, other: Path) -> str:
    what = "text" if is_text(kind) else str(kind)
    why = " (as all of a CSV file)" if extensions(path.name)[0] in ("csv", "tsv") else ""
    return f"{what} in {_short(path, other)}{why}"


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
    return is_text(kind) and is_text(wide)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is one of text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))

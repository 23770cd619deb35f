"""What the recipe's schema says of each key: which there are, in which section, and which values they take."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, cast

from accel_trainer.draft import Keys
from accel_trainer.recipe import Recipe


@cache
def _schema() -> dict[str, Any]:
    return Recipe.model_json_schema()


def _alternatives(schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in schema:
        return _alternatives(_schema()["$defs"][schema["$ref"].rpartition("/")[2]])
    return [flat for one in schema["anyOf"] for flat in _alternatives(one)] if "anyOf" in schema else [dict(schema)]


def allowed_at(keys: Keys) -> list[dict[str, Any]]:
    """The schemas that a value at `keys` may have; none where there is no such key."""
    allowed = _alternatives(_schema())
    for key in keys:
        below = [
            schema.get("items") if isinstance(key, int) else schema.get("properties", {}).get(key, _beyond(schema))
            for schema in allowed
        ]
        allowed = [flat for schema in below if schema is not None for flat in _alternatives(schema)]
    return allowed


def _beyond(schema: Mapping[str, Any]) -> Any:
    """The schema of a mapping's values where any key is allowed; None where not."""
    further = schema.get("additionalProperties")
    return {} if further is True else further or None


@cache
def sections() -> dict[Keys, dict[str, Any]]:
    """Every section's own schema, outer ones first."""
    found: dict[Keys, dict[str, Any]] = {(): _schema()}
    for keys in (waiting := [cast(Keys, ())]):  # grows while it is walked
        for name in found[keys]["properties"]:
            for schema in allowed_at((*keys, name)):
                if "properties" in schema:
                    found[(*keys, name)] = schema
                    waiting.append((*keys, name))
    return found


def field_of(keys: Keys) -> Keys | None:
    """The field of a section that `keys` lie in; None where they lie in no field."""
    for depth in range(1, len(keys) + 1):
        if keys[depth - 1] not in sections()[keys[: depth - 1]]["properties"]:
            return None
        if keys[:depth] not in sections():
            return keys[:depth]
    return keys


def is_required(keys: Keys) -> bool:
    """Whether a field or section must be given."""
    return keys[-1] in sections()[keys[:-1]].get("required", [])

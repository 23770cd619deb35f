"""A draft to a `Recipe`, and what pydantic and the recipe's rules refuse, in words of the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from accel_trainer.draft import ABSENT, Draft, Keys, look_up, shown
from accel_trainer.recipe import RULES_LATER, Recipe
from accel_trainer.recipe_fields import allowed_at, field_of, is_required, sections
from accel_trainer.yaml_text import read_scalar

# What stands in for a faulty value that must be there, so that everything else can be checked.
_STAND_INS: dict[str, Any] = {
    "dataset": {"path": "org/name", "splits": {"train": "train"}},
    "model": {"checkpoint": "org/name"},
    "training": {"global_batch_size": 1, "learning_rate": 1.0, "max_steps": 1},
}
_JSON_TYPES: dict[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}


def checked(draft: Draft) -> Recipe:
    """The recipe, meaningless unless the draft is free of mistakes afterwards."""
    for section in sections():
        nullable = any(schema.get("type") == "null" for schema in allowed_at(section))
        if draft.get(section, ABSENT) is None and not nullable:
            draft.put(section, {})  # a heading whose keys are all commented out
    draft.faulty |= {keys for keys in draft.suspects if draft.get(keys, ABSENT) is ABSENT}
    _drop_faulty(draft)
    try:
        recipe = Recipe.model_validate(draft.values, context=RULES_LATER)
    except ValidationError as error:
        _report(draft, error.errors(include_url=False))
        _drop_faulty(draft)
        recipe = Recipe.model_validate(draft.values, context=RULES_LATER)
    _report_rules(draft, recipe)
    return recipe


def _drop_faulty(draft: Draft) -> None:
    """Replace what is faulty by its default, or by a stand-in where there is none."""
    for at in {at for keys in draft.faulty if (at := field_of(keys)) is not None}:
        absent = (at[:depth] for depth in range(1, len(at)) if draft.get(at[:depth], ABSENT) is ABSENT)
        at = next(absent, at)  # a section is not missing where its keys stand elsewhere by mistake
        outer = draft.get(at[:-1])
        if isinstance(outer, dict):
            outer.pop(at[-1], None)
            if is_required(at):
                outer[at[-1]] = deepcopy(look_up(_STAND_INS, at))


def _report_rules(draft: Draft, recipe: Recipe) -> None:
    known = frozenset(draft.faulty)
    around = {keys[:depth] for keys in known for depth in range(len(keys))}
    for keys in sections():
        section: Any = recipe
        for key in keys:
            section = getattr(section, str(key), None)
        for broken in section.rules() if section else ():
            involved = [(*keys, *name.split(".")) for name in (broken.field, *broken.also)]
            if not any(one in around or one[:depth] in known for one in involved for depth in range(1, len(one) + 1)):
                draft.fault(involved[0], broken.what, broken.remedy)


def _report(draft: Draft, errors: Sequence[ErrorDetails]) -> None:
    """One mistake for each value that pydantic refuses, however many alternatives it was tried against."""
    kinds: dict[Keys, set[str]] = {}
    for error in errors:
        kinds.setdefault(_located(draft.values, error), set()).add(error["type"])
    around = {keys[:depth] for keys in kinds for depth in range(len(keys))}
    for keys, found in kinds.items():
        if keys not in around:  # an alternative that was not meant
            # One value may stand where a list of them does: then it has no place of its own.
            at = keys[:-1] if isinstance(keys[-1], int) and keys not in draft.spots else keys
            draft.fault(at, *_explained(draft, keys, found))


def _located(values: object, error: ErrorDetails) -> Keys:
    """The keys of an error, without the names of alternatives that pydantic puts between them."""
    if error["type"] == "missing":
        return error["loc"]
    keys: Keys = ()
    for part in error["loc"]:
        if look_up(values, (*keys, part), ABSENT) is not ABSENT:
            keys = (*keys, part)
    return keys


def _explained(draft: Draft, keys: Keys, kinds: set[str]) -> tuple[str, str]:
    """What is wrong with a refused value, and what to do."""
    value, allowed = draft.get(keys), allowed_at(keys)
    written = draft.spots[keys].written if keys in draft.spots else str(value)
    types = {schema.get("type") for schema in allowed}
    wanted = " or ".join(dict.fromkeys(map(_in_words, allowed)))
    section = next((schema for schema in allowed if "properties" in schema), None)
    if "missing" in kinds:
        if section:
            return "it is missing", f"add it, with {', '.join(look_up(_STAND_INS, keys))}"
        return "it is missing", f"add it: {_description(keys)}"
    if section:
        return f"{_quoted(value, written)} is no section", "write its keys below it, indented"
    choices = [choice for schema in allowed for choice in schema.get("enum", [schema.get("const")]) if choice]
    if choices and isinstance(value, str):
        near = get_close_matches(value.lower(), choices, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"'{shown(value)}' is no choice", f"{hint}choose from {', '.join(choices)}"
    quoted, remedy = _quoted(value, written), f"give {wanted}"
    if "finite_number" in kinds or (isinstance(value, int) and "number" in types and abs(value) > 1e300):
        return f"{quoted} is not a finite number", remedy
    if any(kind.startswith("greater_than") for kind in kinds):
        return f"{quoted} is too small", remedy
    if any(kind.startswith("less_than") for kind in kinds):
        return f"{quoted} is too large", remedy
    plain = read_scalar(value) if isinstance(value, str) else None
    if plain is not None and _JSON_TYPES[type(plain)] in types | ({"integer"} if "number" in types else set()):
        remedy = "remove the quotes"
    elif isinstance(value, bool | int | float) and "string" in types:
        remedy = "put it in quotes"
    elif isinstance(value, float) and value.is_integer() and "integer" in types:
        remedy = f"write {int(value)}"
    elif types == {"array"} and isinstance(value, str | int | float):
        remedy = f"write a list: [{shown(written)}]"
    nouns = list(dict.fromkeys(_noun(schema) for schema in allowed if schema.get("type") != "null"))
    refused = f"is not {nouns[0]}" if len(nouns) == 1 else f"is neither {' nor '.join(nouns)}"
    return f"{quoted} {refused}", remedy


def _quoted(value: object, written: str) -> str:
    """A value as it was written, in quotes if it is text."""
    plain = isinstance(value, str) and not written.startswith(("'", '"'))
    return f"'{shown(written or str(value))}'" if plain else shown(written) or "nothing"


def _noun(schema: Mapping[str, Any]) -> str:
    if schema.get("type") == "array":
        return "a list of text"
    nouns = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false"}
    return nouns.get(schema.get("type", ""), "a mapping")


def _in_words(schema: Mapping[str, Any]) -> str:
    """What a schema allows, bounds included."""
    if choices := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return " or ".join(choices)
    words = {
        "minimum": "from {}",
        "exclusiveMinimum": "above {}",
        "maximum": "up to {}",
        "exclusiveMaximum": "below {}",
    }
    bounds = [words[bound].format(schema[bound]) for bound in words if bound in schema]
    noun = "null" if schema.get("type") == "null" else _noun(schema)
    return f"{noun} {' and '.join(bounds)}".rstrip()


def _description(keys: Keys) -> str:
    text = sections()[keys[:-1]]["properties"][keys[-1]].get("description", "")
    return str(text)[:1].lower() + str(text)[1:].rstrip(".")

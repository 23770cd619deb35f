"""Write docs/recipe_reference.md: every key of a recipe, from its schema.

python scripts/write_recipe_reference.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accel_trainer.draft import dotted, look_up
from accel_trainer.recipe import Recipe, Result
from accel_trainer.recipe_fields import sections

PATH = Path(__file__).resolve().parent.parent / "docs" / "recipe_reference.md"
HEAD = """\
# Every key of a recipe

A recipe is a mapping of these sections, in any order. What has a dash for a default must be given. Numbers, booleans and text are read as
YAML 1.2 reads them: `2e-5` is a number, `no` is text. `accel-trainer show RECIPE` prints a recipe with every default filled in;
names that other trainers use are answered, or read as these ([coming from Trainer](coming_from_trainer.md)).

This page is written by `make tables`.
"""
# A recipe that says as little as possible.
LEAST = Recipe.model_validate(
    {
        "dataset": {"path": "data", "splits": {"train": "train"}},
        "model": {"from_config": {"model_type": "bert"}, "train_tokenizer": {}},
        "training": {"global_batch_size": 1, "max_steps": 1, "learning_rate": 1.0},
    }
)
DEFAULTS = {keys: look_up(LEAST.model_dump(), keys) for keys in sections()}
GIVEN = {("dataset", "path"), ("model", "from_config"), ("training", "max_steps")}  # one of several that must be
for _section, _name in GIVEN:
    DEFAULTS[(_section,)][_name] = None
BOUNDS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
NOUNS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true, false", "null": "null"}


def reference() -> str:
    """The whole page."""
    outer = list(Recipe.model_fields)
    ordered = sorted(sections(), key=lambda keys: [outer.index(str(keys[0])) if keys else -1, *map(str, keys[1:])])
    tables = [table(dotted(keys), sections()[keys], DEFAULTS[keys]) for keys in ordered]
    result = Result(date="2026-01-31", step=0, metrics={}).model_dump()
    tables.append(table("results, each", Result.model_json_schema(), result))
    return "\n".join([HEAD, *tables])


def table(title: str, schema: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """A section's keys, without the sections in it, which have tables of their own."""
    about = " ".join(schema.get("description", "").split("\n\n")[0].split())
    lines = [f"## {title or 'The whole'}", "", about, "", "| key | value | default | |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        if not is_section(field):
            written = "—" if name in schema.get("required", []) else default(defaults[name])
            lines.append(f"| `{name}` | {value(field)} | {written} | {cell(field.get('description', ''))} |")
    return "\n".join([*lines, ""]) if len(lines) > 6 else ""


def is_section(field: Mapping[str, Any]) -> bool:
    """Whether a field holds keys of its own."""
    return (
        "$ref" in field
        or any("$ref" in one for one in field.get("anyOf", []))
        or field.get("items", {}).keys() == {"$ref"}
    )


def value(field: Mapping[str, Any]) -> str:
    """What a field takes, in words."""
    return " or ".join(
        dict.fromkeys(word for one in field.get("anyOf", [field]) for word in words(one) if word != "null")
    )


def words(schema: Mapping[str, Any]) -> Iterator[str]:
    """What one alternative takes."""
    if choices := schema.get("enum", [schema["const"]] if "const" in schema else []):
        yield ", ".join(f"`{choice}`" for choice in choices)
    elif schema.get("type") == "array":
        inside = " or ".join(words(schema.get("items", {})))
        yield f"list of {inside}"
    elif schema.get("type") == "object":
        further = schema.get("additionalProperties")
        of = value(further) if isinstance(further, dict) and further else "anything"
        yield f"mapping of {of}"
    else:
        bounds = " and ".join(text.format(schema[bound]) for bound, text in BOUNDS.items() if bound in schema)
        yield f"{NOUNS[schema.get('type', 'string')]} {bounds}".strip()


def default(value: Any) -> str:
    """A default, as one would write it."""
    return f"`{json.dumps(value, ensure_ascii=False)}`".replace('"', "") if value != "" else ""


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PATH.write_text(reference(), encoding="utf-8")
    print(PATH)

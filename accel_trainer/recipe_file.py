"""Recipes as text: YAML to `Recipe` and back, every mistake of a file at once, each with its line and its remedy.

    text ──yaml_text──▶ Draft ──respelling, recipe_paths──▶ Draft ──recipe_check──▶ Recipe
                          ▲
    section.key=value ────┘

A recipe is flat: plain mappings, lists and scalars, as `yaml_text` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accel_trainer.draft import ABSENT, Draft, Keys, Unreadable, dotted, shown
from accel_trainer.errors import Mistake, RecipeError
from accel_trainer.file_names import is_data_file
from accel_trainer.recipe import Recipe
from accel_trainer.recipe_check import checked
from accel_trainer.recipe_fields import allowed_at
from accel_trainer.recipe_paths import resolve_paths, similar_files
from accel_trainer.redaction import holds_secret
from accel_trainer.respelling import respell
from accel_trainer.yaml_text import MAX_DEPTH, read_plain, read_yaml, write_yaml

COMMAND_LINE = "command line"
MAX_BYTES = 1_000_000

_OF_ACCELERATE = {
    "compute_environment",
    "distributed_type",
    "mixed_precision",
    "num_machines",
    "num_processes",
    "use_cpu",
}
_LABELS: Keys = ("dataset", "labels")  # class names are text however they look: `[no, yes]`, `{0: bad, 1: good}`


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `section.key=value` overrides applied in order.

    Relative files and folders become absolute: those the file names are looked for beside it, then in the working
    directory; those an override names, the other way round.

    Raises:
        RecipeError: every mistake of the file and of the overrides, the file's first, in the order of its lines.
    """
    return _faultless(*examine_recipe(path, overrides))


def as_written(path: str | Path) -> Recipe:
    """The recipe in a YAML file, with the files and folders that it names as they stand there, wherever these are.

    Raises:
        RecipeError: every mistake of the file, in the order of its lines.
    """
    return _faultless(*_written(path))


def glance(path: str | Path) -> tuple[Recipe, bool]:
    """As `as_written`, and whether what it names is there; folders are not searched for what globs match.

    Raises:
        RecipeError: as `as_written`.
    """
    recipe, draft = _written(path)
    _faultless(recipe, draft)
    resolve_paths(draft, Path(path).parent, globs=False)
    return recipe, not draft.mistakes


def examine_recipe(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Draft]:
    """As `load_recipe`, but mistakes stay in the draft, in that order; what they spoil is a stand-in in the recipe.

    Raises:
        RecipeError: nothing can be read.
    """
    return _examined(_content(path), str(path), overrides, Path(path).parent)


def _content(path: str | Path) -> bytes:
    draft, path = Draft(str(path)), Path(path)
    if is_data_file(path.name) and path.suffix not in (".yaml", ".yml"):
        draft.fault((), "this is a table, no recipe", "name it in a recipe: dataset.path")
        raise RecipeError(draft.mistakes)
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        draft.fault((), "there is no such file", similar_files(path))
    except IsADirectoryError:
        draft.fault((), "this is a folder", similar_files(path / path.name))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        draft.fault((), f"the file cannot be read: {reason}", "check its name and permissions")
    raise RecipeError(draft.mistakes)


def parse_recipe(
    text: str | bytes, source: str, overrides: Sequence[str] = (), base: str | Path | None = None
) -> Recipe:
    """The recipe in a text; `source` names it in mistakes, and relative files are looked for in the folder `base` too.

    Raises:
        RecipeError: every mistake of the text and of the overrides.
    """
    return _faultless(*_examined(text, source, overrides, None if base is None else Path(base)))


def _examined(text: str | bytes, source: str, overrides: Sequence[str], base: Path | None) -> tuple[Recipe, Draft]:
    draft = _drafted(text, source, overrides)
    _refuse_idle_epochs(draft)
    resolve_paths(draft, base)
    recipe = checked(draft)
    draft.mistakes.sort(key=reading_order)
    return recipe, draft


def _written(path: str | Path) -> tuple[Recipe, Draft]:
    draft = _drafted(_content(path), str(path))
    recipe = checked(draft)
    draft.mistakes.sort(key=reading_order)
    return recipe, draft


def _drafted(text: str | bytes, source: str, overrides: Sequence[str] = ()) -> Draft:
    """What is written, under the recipe's own names, without secrets."""
    draft = read_draft(text, source)
    respell(draft)
    for typed in overrides:
        _apply_override(draft, typed)
    _refuse_secrets(draft, draft.values)
    return draft


def _faultless(recipe: Recipe, draft: Draft) -> Recipe:
    if draft.mistakes:
        raise RecipeError(draft.mistakes)
    return recipe


def read_draft(text: str | bytes, source: str) -> Draft:
    """The plain values of a text as they are written, under old names too, and what is wrong with the YAML.

    Raises:
        RecipeError: nothing can be read, or there is no mapping.
    """
    draft = Draft(source)
    try:
        draft.values = _read_mapping(_decoded(text, draft), draft)
    except Unreadable:
        raise RecipeError(draft.mistakes) from None
    return draft


def to_yaml(recipe: Recipe, header: str = "") -> str:
    """YAML that loads back to an equal recipe: keys in the schema's order, defaults included, `header` as comments.

    Readers of YAML 1.1 and of YAML 1.2 find the same values in it.
    """
    comments = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    # What no step depends on is left out where there is nothing to say: source, derived_from, results.
    values = {key: value for key, value in recipe.model_dump().items() if value not in (None, [])}
    head = {key: value for key, value in values.items() if isinstance(value, str)}
    blocks = [write_yaml({key: value}) for key, value in values.items() if key not in head]
    return comments + "\n".join([write_yaml(head), *blocks])


def json_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors; `recipe.schema.json` beside this module is its copy."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "accel_trainer recipe"}
    return head | Recipe.model_json_schema() | head  # first for their place, again for pydantic's title


def schema_text() -> str:
    """The content of `recipe.schema.json`."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def reading_order(mistake: Mistake) -> tuple[bool, float]:
    """Key to sort the mistakes of a recipe by: the file's by their lines, those without a line, then the overrides'."""
    return mistake.source == COMMAND_LINE, float("inf") if mistake.line is None else mistake.line


def _decoded(text: str | bytes, draft: Draft) -> str:
    if len(text) > MAX_BYTES:
        draft.fault((), "the file is over 1 MB", "give a recipe; data go in files of their own")
        raise Unreadable
    if isinstance(text, str):
        return text.removeprefix("\ufeff")
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        draft.fault((), "the file is not UTF-8 text", "save it as UTF-8", line)
        raise Unreadable from None


def _read_mapping(text: str, draft: Draft) -> dict[str, Any]:
    value = read_yaml(text, draft, texts=_LABELS)
    if value is ABSENT or (value is None and not draft.mistakes):
        draft.fault((), "the file is empty", "start from a recipe that ships with the package")
    elif not isinstance(value, dict):
        draft.fault((), "this is no recipe", "write sections such as dataset:, with their keys indented below")
    elif len(value.keys() & _OF_ACCELERATE) > 1:
        draft.fault((), "this is an accelerate config, no recipe", "give it by --config_file")
    else:
        return value
    raise Unreadable


# --- overrides --------------------------------------------------------------------------------------------------------


def read_overrides(overrides: Sequence[str]) -> dict[Keys, Any]:
    """The plain values that overrides set, in their order, under the recipe's own names; nothing is checked.

    Raises:
        RecipeError: one cannot be read.
    """
    draft, values = Draft(COMMAND_LINE), dict[Keys, Any]()
    for typed in overrides:
        for keys in _apply_override(draft, typed):
            values.pop(keys, None)  # the last one has the last place too
            values[keys] = draft.get(keys)
    if draft.mistakes:
        raise RecipeError(draft.mistakes)
    return values


def _apply_override(draft: Draft, typed: str) -> list[Keys]:
    """Lay `section.key=value` over the draft; later overrides win over earlier ones. Returns the keys set."""
    side = Draft(COMMAND_LINE, typed)
    try:
        keys = _read_override(side, typed)
    except Unreadable:
        keys = ()
    moved = respell(side)
    found = [new for new in [*moved.values(), *([keys] if keys else [])] if side.get(new, ABSENT) is not ABSENT]
    for new in found:
        value = side.get(new)
        if blocked := draft.put(new, value):
            what = f"nothing can be set below {dotted(blocked)}, which is {shown(draft.spot(blocked).written)}"
            side.fault(new, what, "set it whole", suspect=blocked)
            continue
        draft.spots = {at: spot for at, spot in draft.spots.items() if at[: len(new)] != new}
        draft.spots |= {at: spot for at, spot in side.spots.items() if at[: len(new)] == new}
    draft.mistakes += side.mistakes
    draft.faulty |= side.faulty
    draft.suspects |= side.suspects
    return found


def _refuse_idle_epochs(draft: Draft) -> None:
    """Epochs on the command line do nothing where the file has max_steps, which win."""
    steps, epochs = ("training", "max_steps"), ("training", "num_train_epochs")
    of_file = draft.get(steps) is not None and not draft.spot(steps).override
    if of_file and draft.get(epochs) is not None and draft.spot(epochs).override:
        wins = f"it has no effect: max_steps wins, {draft.spot(steps).written} in line {draft.spot(steps).line}"
        draft.fault(epochs, wins, "add training.max_steps=null")


def _refuse_secrets(draft: Draft, value: Any, keys: Keys = ()) -> None:
    """A recipe is shared, and copied into every run."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_secrets(draft, item, (*keys, key))
    elif isinstance(value, str) and holds_secret(value):
        remedy = "take it out: log in (hf auth login), or put it into the environment or ~/.netrc; a recipe is shared"
        draft.fault(keys, "there is a token or a password in it", remedy)


def _read_override(side: Draft, typed: str) -> Keys:
    """Read one override into a draft of its own; returns the keys it sets, none after a mistake."""
    left, equals, right = typed.partition("=")
    keys: Keys = tuple(part.strip() for part in left.split("."))
    written = right.strip()
    if not equals:
        side.fault((), "an override has no =", "write section.key=value")
        return ()
    if not all(keys):
        side.fault((), "an override needs a key before its =", "write section.key=value")
        return ()
    if len(keys) > MAX_DEPTH:
        side.fault((), f"a key of {len(keys)} parts", "a recipe is flat; write section.key=value")
        return ()
    for depth in range(len(keys)):
        side.place(keys[: depth + 1], 0, written)
    for depth in range(1, len(keys)):
        schemas = allowed_at(keys[:depth])
        if schemas and not any(schema.get("type", "object") == "object" for schema in schemas):
            side.fault(keys, f"{dotted(keys[:depth])} holds one value, with nothing below it", "set it whole")
            return ()
    # Whoever quotes or brackets the whole of a value means YAML; a slice such as train[:8000] is plain text.
    if written.startswith(("[", "{", "'", '"')):
        value = read_yaml(written, side, keys, _LABELS)
    else:
        value = read_plain(written, side, keys, _LABELS)
    side.put(keys, value)
    return keys

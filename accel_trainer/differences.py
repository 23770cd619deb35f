"""What differs between two recipes, or between a checkpoint and a recipe, key by key, and what that means for a run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

Meaning = Literal["steps", "data", "scores", "open", "rounding", "result", "nothing"]

IN_WORDS: dict[Meaning, str] = {
    "steps": "other steps",
    "data": "other data or weights",
    "scores": "other scores, and what they decide",
    "open": "fixed on one side only",
    "rounding": "other rounding",
    "result": "what it came to",
    "nothing": "no step depends on it",
}

# Keys that say where data and checkpoints lie; what is read from there is known by its hash.
PLACES: dict[str, tuple[str, ...]] = {
    "dataset": ("path", "name", "revision", "data_files", "encoding", "sha256"),
    "model": ("checkpoint", "revision", "sha256", "tokenizer", "tokenizer_revision"),
}
# Keys that a recipe may leave open, and that the recipe of a run fixes.
FIXED_BY_A_RUN = (
    "dataset.revision",
    "dataset.max_length",
    "dataset.labels",
    "dataset.sha256",
    "model.revision",
    "model.tokenizer_revision",
    "model.sha256",
)
_OF_SCORES = re.compile(
    r"evaluation\..*|data\.(validation|test)|dataset\.(sha256|splits|data_files)\.(validation|test)"
    r"|dataset\.max_(eval|predict)_samples|saving\.load_best_model_at_end"
)
_HASH = re.compile(r"[0-9a-f]{64}")


def flat(values: dict[str, Any], key: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, under dotted keys."""
    pairs = ((f"{key}.{name}" if key else name, value) for name, value in values.items())
    return {
        dotted: leaf
        for place, value in pairs
        for dotted, leaf in (flat(value, place) if isinstance(value, dict) and value else {place: value}).items()
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values differ between two nested dictionaries, with both values; None where one has none.

    Section by section, in the order of the first dictionary, then of the second.
    """
    old, new = flat(before), flat(now)
    changed = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    places = {section: place for place, section in enumerate(dict.fromkeys([*before, *now]))}
    return [(key, old.get(key), new.get(key)) for key in sorted(changed, key=lambda key: places[key.partition(".")[0]])]


def meaning(key: str) -> Meaning:
    """What another value of a key means, as far as the key alone tells."""
    section, _, rest = key.partition(".")
    if _OF_SCORES.fullmatch(key):
        return "scores"
    if section == "data" or rest.partition(".")[0] in PLACES.get(section, ()):
        return "data"
    if section in ("description", "source", "derived_from", "saving", "tracking"):
        return "nothing"
    if section == "results":
        return "result"
    return "rounding" if section in ("hardware", "versions", "layout", "max_tokens_per_device") else "steps"


def short(value: Any) -> str:
    """A value for a line of a table: of a hash its beginning, of long ones beginning and end."""
    if isinstance(value, list):
        text = f"[{', '.join(map(short, value))}]"
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = f"{text[:12]}…" if _HASH.fullmatch(text) else text
    return text if len(text) <= 60 else f"{text[:28]} … {text[-29:]}"


def in_groups(changed: Sequence[tuple[str, Any, Any]], before: str, now: str) -> str:
    """Lines that tell both values of each key, under headings of what the differences mean."""
    groups: dict[Meaning, list[str]] = {}
    for key, old, new in changed:
        groups.setdefault(meaning(key), []).append(f"  {key}: {short(old)} {before}, {short(new)} {now}")
    return "\n".join(line for heading, lines in groups.items() for line in (f"{IN_WORDS[heading]}:", *lines))

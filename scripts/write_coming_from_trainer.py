"""Write the tables of names in docs/coming_from_trainer.md, from the recipe's schema and from `spellings`.

python scripts/write_coming_from_trainer.py
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainingArguments

from accel_trainer.recipe import RULES_LATER, Recipe
from accel_trainer.recipe_fields import is_required, sections
from accel_trainer.spellings import ANSWERED, ANSWERED_VALUES, RENAMED, TRANSLATED, Answered

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "coming_from_trainer.md"
BEGIN = "<!-- names: written by scripts/write_coming_from_trainer.py; edits here are lost -->"
END = "<!-- end of names -->"

# Arguments of run_classification.py that the recipe has by the same name, with their defaults there.
SCRIPT_DEFAULTS = {
    "shuffle_seed": 42,
    "max_train_samples": None,
    "max_eval_samples": None,
    "max_predict_samples": None,
}
# A value of each key whose values are translated, as Trainer spells it.
SPELT_THERE: dict[str, Any] = {
    "training.optim": "adamw_torch_fused",
    "training.max_steps": -1,
    "evaluation.metric_for_best_model": "eval_f1",
    "tracking.report_to": "none",
}
_HARDWARE = ANSWERED["bf16"].what


def trainer_defaults() -> dict[str, Any]:
    """Return the names that Trainer's users know, with their defaults: arguments, script and early stopping."""
    fields = {
        field.name: field.default_factory()
        if field.default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING
        else field.default
        for field in dataclasses.fields(TrainingArguments)
    }
    stopping = inspect.signature(EarlyStoppingCallback).parameters
    return {**fields, **SCRIPT_DEFAULTS, **{name: parameter.default for name, parameter in stopping.items()}}


def recipe_defaults() -> Iterator[tuple[str, str, str]]:
    """Yield section, key and default of every key of the recipe, as cells."""
    least = {
        "dataset": {"splits": {"train": "train"}},
        "model": {},
        "training": {"global_batch_size": 1, "learning_rate": 1.0},
    }
    values = Recipe.model_validate(least, context=RULES_LATER).model_dump()
    for keys, schema in sections().items():
        at: Any = values
        for key in keys:
            at = at[key] if isinstance(at, dict) else None
        for name in schema["properties"] if isinstance(at, dict) else []:
            yield ".".join(map(str, keys)), name, "must be given" if is_required((*keys, name)) else cell(at[name])


def cell(value: Any) -> str:
    """Write a value as YAML has it."""
    if isinstance(value, Enum):
        value = value.value
    plain = {None: "null", True: "true", False: "false"}
    return f"`{plain[value] if value is None or isinstance(value, bool) else value}`"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Write a Markdown table."""
    header = list(header)
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def grouped(entries: Mapping[str, Any]) -> dict[Any, str]:
    """Return the names of `entries` by what they lead to, each list of names as a cell."""
    groups: dict[Any, list[str]] = {}
    for name, target in entries.items():
        groups.setdefault(target, []).append(f"`{name}`")
    return {target: ", ".join(names) for target, names in groups.items()}


def home(answer: Answered) -> str:
    """Say which of the tables an answer belongs in."""
    if answer.what == _HARDWARE:
        return "hardware"
    if "--" in answer.remedy:
        return "command line"
    return "other key" if answer.instead or answer.remedy.startswith("give ") else "gone"


def tables() -> str:
    """Write all the tables: every name once, in the one that says what it is here."""
    there = trainer_defaults()
    same = [(name, f"`{section}`", there[name], here) for section, name, here in recipe_defaults() if name in there]
    answers: dict[str, dict[str, Answered]] = {}
    for name, answer in ANSWERED.items():
        answers.setdefault(home(answer), {})[name] = answer
    lines = ["### The same name", ""]
    lines += table(
        ["key", "section", "default there", "default here"],
        ([f"`{name}`", section, cell(default), here] for name, section, default, here in same),
    )
    lines += ["### Another name", ""]
    renamed = grouped({name: renamed.new for name, renamed in RENAMED.items()})
    lines += table(["there, or in other tutorials", "here"], ([names, f"`{new}`"] for new, names in renamed.items()))
    lines += ["### Another key does its work", ""]
    lines += table(
        ["there", "why", "here"],
        ([names, one.what, one.remedy] for one, names in grouped(answers["other key"]).items()),
    )
    lines += ["### The accelerate config decides it", ""]
    lines += table(["there", "here"], ([names, one.remedy] for one, names in grouped(answers["hardware"]).items()))
    lines += ["### The command line decides it", ""]
    lines += table(
        ["there", "why", "here"],
        ([names, one.what, one.remedy] for one, names in grouped(answers["command line"]).items()),
    )
    lines += ["### The program decides it, or it is gone", ""]
    lines += table(
        ["there", "why", "what to do"],
        ([names, one.what, one.remedy] for one, names in grouped(answers["gone"]).items()),
    )
    lines += ["### Values", ""]
    translated = (
        [f"`{key}: {SPELT_THERE[key]}`", f"read as {cell(read(SPELT_THERE[key]))}"] for key, read in TRANSLATED.items()
    )
    answered = (
        [f"`{key}: {value}`", f"{answer.what}; {answer.remedy}"]
        for key, values in ANSWERED_VALUES.items()
        for value, answer in values.items()
    )
    lines += table(["there", "here"], [*translated, *answered])
    return "\n".join(lines)


def with_tables(document: str) -> str:
    """Return the document with what stands between its markers written anew."""
    before, _, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{DOCUMENT} has lost its markers"
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    print(DOCUMENT)

"""The command line of every program of this package: options of other trainers are answered with this one's spelling."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from typing_extensions import override

from accel_trainer import redaction
from accel_trainer.draft import dotted
from accel_trainer.recipe_fields import field_of, sections
from accel_trainer.spellings import ANSWERED, RENAMED

_OPTION = re.compile(r"--([A-Za-z][\w.-]*)(?:[= ]([^-\s][^\s]*))?")


class Parser(redaction.Parser):
    """An argparse parser that knows what people write for other trainers, and what stands free among the options."""

    @override
    def error(self, message: str) -> NoReturn:
        # What may be left out is named too, by parse_intermixed_args (Python 3.11 to 3.14).
        message = re.sub(r"(required: .*), section\.\S+=value$", r"\1", message)
        if message.startswith("unrecognized arguments:"):
            options = [name for action in self._actions for name in action.option_strings]
            answers = (_answer(option, options) for option in _OPTION.findall(message))
            message = "; ".join([message, *filter(None, answers)])
        super().error(message)


def _answer(option: tuple[str, str], options: Sequence[str]) -> str | None:
    """What to write instead of an option that is a recipe's key, or is like one of the program's; else None."""
    name, value = option[0].replace("-", "_"), option[1] or "VALUE"
    keys = tuple(name.split("."))
    if len(keys) > 1 and field_of(keys) == keys:
        return f"for --{option[0]} write {name}={value}"
    if name in RENAMED:
        return f"for --{option[0]} write {RENAMED[name].new}={value}"
    if name in ANSWERED:
        return f"--{option[0]}: {ANSWERED[name].what}; {ANSWERED[name].remedy}"
    found = [dotted((*section, name)) for section, schema in sections().items() if name in schema["properties"]]
    if found:
        return f"for --{option[0]} write {' or '.join(f'{key}={value}' for key in found)}"
    close = get_close_matches(f"--{name}", options, 1)
    return f"did you mean {close[0]}?" if close else None


def recipes_and_overrides(free: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands free on a command line: recipes, and `section.key=value`."""
    is_override = [bool(re.match(r"[\w.]+\s*=", word)) for word in free]
    recipes = [word for word, found in zip(free, is_override, strict=True) if not found]
    return recipes, [word for word, found in zip(free, is_override, strict=True) if found]

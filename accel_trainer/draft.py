"""Plain values while they are being read: where each was written, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from accel_trainer.errors import Mistake

Keys = tuple[str | int, ...]
ABSENT = object()


class Unreadable(Exception):
    """Nothing more can be read after the mistake just reported."""


class Spot(NamedTuple):
    """Where a value was written, and how."""

    source: str
    line: int | None
    written: str = ""
    override: str = ""  # the whole override as typed


@dataclass
class Draft:
    """Values so far, by section and key, and the mistakes found in them."""

    source: str
    override: str = ""
    subject: str = "a recipe"  # what is being read, in words
    values: dict[str, Any] = field(default_factory=dict)
    spots: dict[Keys, Spot] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    faulty: set[Keys] = field(default_factory=set)  # reported already: nothing more is said about these
    suspects: set[Keys] = field(default_factory=set)  # meant by something reported: no mistake if they are missing

    def get(self, keys: Keys, default: object = None) -> Any:
        """The value at `keys`."""
        return look_up(self.values, keys, default)

    def put(self, keys: Keys, value: object) -> Keys | None:
        """Set a value, making the mappings around it; or return the keys of what is in the way."""
        values = self.values
        for depth, key in enumerate(keys[:-1], start=1):
            name = cast(str, key)
            values[name] = {} if values.get(name) is None else values[name]
            if not isinstance(values[name], dict):
                return keys[:depth]
            values = values[name]
        values[cast(str, keys[-1])] = value
        return None

    def spot(self, keys: Keys) -> Spot:
        """Where a key stands, or else the section around it."""
        while keys:
            if keys in self.spots:
                return self.spots[keys]
            keys = keys[:-1]
        return Spot(self.source, None, override=self.override)

    def place(self, keys: Keys, line: int, written: str) -> None:
        """Note where a value stands; an override has no lines."""
        self.spots[keys] = Spot(self.source, None if self.override else line, written, self.override)

    def move(self, old: Keys, new: Keys) -> None:
        """Let what stood at `old`, or below it, stand at `new`."""
        for keys in [keys for keys in self.spots if keys[: len(old)] == old]:
            self.spots[new + keys[len(old) :]] = self.spots.pop(keys)

    def fault(self, keys: Keys, what: str, remedy: str, line: int | None = None, suspect: Keys | None = None) -> None:
        """Report a mistake at `keys`; given a `suspect`, the known key that an unknown one seems to mean."""
        spot = self.spot(keys)
        if spot.override:
            what = f"{what} (in `{shown(spot.override)}`)"
        line = spot.line if line is None or spot.override else line
        self.mistakes.append(Mistake(spot.source, line, dotted(keys), what, remedy))
        if suspect is None:
            self.faulty |= {keys} if keys else set()
        else:
            self.suspects |= {suspect} if suspect else set()


def look_up(values: object, keys: Keys, default: object = None) -> Any:
    """The value at `keys` in nested mappings and lists."""
    for key in keys:
        if (isinstance(values, dict) and key in values) or (isinstance(values, list) and isinstance(key, int)):
            values = cast(Any, values)[key]
        else:
            return default
    return values


def dotted(keys: Keys) -> str:
    """Keys as people write them: `dataset.data_files.train[0]`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{shown(key)}" for key in keys).removeprefix(".")


def shown(written: str) -> str:
    """Text fit for a message: one line, not long, and encodable."""
    line = " ".join(written.split()).encode(errors="replace").decode()
    return line if len(line) <= 60 else f"{line[:57]}…"

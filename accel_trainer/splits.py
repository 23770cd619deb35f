"""The small language of `dataset.splits`: `train[:8000]`, `train[80%:]`, `train[:100]+test[-100:]`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal

_SLICE = re.compile(r"(?P<name>[\w.\-]+)\s*(?:\[\s*(?P<start>-?[\d.]+%?)?\s*:\s*(?P<stop>-?[\d.]+%?)?\s*\])?")
_BOUND = re.compile(r"-?(?:\d{1,18}|\d{1,18}(?:\.\d{1,18})?%)")
MAX_SLICES = 1_000  # each is compared with each


@dataclass(frozen=True)
class Slice:
    """A contiguous run of rows of one named split; bounds as written, None where open."""

    name: str
    start: str | None
    stop: str | None

    def bounds(self, n: int) -> tuple[int, int]:
        """First row and one past the last, of a split of n rows: 0 ≤ start ≤ stop ≤ n.

        Percentages round to the nearest row, halves to even. Negative bounds count from the end, as in Python.
        """
        start = 0 if self.start is None else _row(self.start, n)
        stop = n if self.stop is None else _row(self.stop, n)
        return start, max(start, stop)

    def __str__(self) -> str:
        whole = self.start is None and self.stop is None
        return self.name if whole else f"{self.name}[{self.start or ''}:{self.stop or ''}]"


def _row(bound: str, n: int) -> int:
    share = Decimal(bound[:-1]) * n / 100 if bound.endswith("%") else Decimal(bound)
    row = int(share.to_integral_value(ROUND_HALF_EVEN))
    return min(max(row + n if bound.startswith("-") else row, 0), n)


def parse_slices(expression: str) -> tuple[Slice, ...]:
    """Slices of a split expression, in order.

    Raises:
        ValueError: the expression is none; the message says what is wrong with which part.
    """
    slices = []
    parts = expression.split("+", MAX_SLICES)
    if len(parts) > MAX_SLICES:
        raise ValueError(f"more than {MAX_SLICES} slices are joined")
    for part in parts:
        match = _SLICE.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"{part.strip()!r} is no slice of a split")
        for bound in (match["start"], match["stop"]):
            if bound is not None and not _BOUND.fullmatch(bound):
                raise ValueError(f"{bound!r} is no bound of a slice")
            if bound is not None and bound.endswith("%") and abs(Decimal(bound[:-1])) > 100:
                raise ValueError(f"{bound} lies beyond the whole split")
        slices.append(Slice(match["name"], match["start"], match["stop"]))
    return tuple(slices)

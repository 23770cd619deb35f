"""What people read in a terminal: aligned tables, and colour where there is a terminal.

Into a file or a pipe go the same words, unwrapped and without an escape sequence, so that they can be searched and pasted.
`NO_COLOR` and `FORCE_COLOR` are obeyed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from accel_trainer.errors import showable

Style = Literal["", "bold", "dim", "green", "yellow", "red", "cyan"]
UNWRAPPED = 10_000  # columns


def console(*, stderr: bool = False) -> Console:
    """The console for a stream as it is now: redirected, captured or a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    on_terminal = stream.isatty()
    return Console(
        file=stream,
        width=None if on_terminal else UNWRAPPED,
        soft_wrap=not on_terminal,
        force_terminal=True if os.environ.get("FORCE_COLOR") else None,
        highlight=False,
        markup=False,
        emoji=False,
    )


def say(text: object, style: Style = "", *, stderr: bool = False) -> None:
    """Print a line, or several; what a file put into them is shown and not obeyed."""
    where = console(stderr=stderr)
    where.print(Text(showable(str(text), 100_000), style), soft_wrap=True)


def print_table(
    headers: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    numbers: Iterable[int] = (),
    styles: Sequence[Style] = (),
) -> None:
    """Print rows under headers, aligned by the cells that characters take: two for a Chinese one.

    Args:
        headers: of the columns; where all are empty, no line is spent on them.
        rows: cells of one length with `headers`; None is shown as nothing.
        numbers: positions of columns aligned to the right.
        styles: of the rows, in order; those left out are plain.
    """
    right = set(numbers)
    table = Table(box=None, show_header=any(headers), header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i in right else "left", overflow="fold")
    for i, row in enumerate(rows):
        cells = (Text("" if cell is None else showable(str(cell), 10_000)) for cell in row)
        table.add_row(*cells, style=styles[i] if i < len(styles) else "")
    where = console()
    with where.capture() as capture:
        where.print(table)
    for line in capture.get().splitlines():  # rich fills every line up to the last column's width
        print(line.rstrip(" "))


def padded(text: str, width: int) -> str:
    """Text and the spaces up to `width` cells of a terminal."""
    return text + " " * max(0, width - cell_len(text))

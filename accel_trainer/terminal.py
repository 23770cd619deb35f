"""What people read in a terminal: aligned tables, and colour where there is a terminal.

Into a file or a pipe go the same words, unwrapped and without an escape sequence, so that they can be searched and pasted.
`NO_COLOR` and `FORCE_COLOR` are obeyed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from io import TextIOWrapper
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from accel_trainer.errors import AccelTrainerError, Interrupted, showable

Style = Literal["", "bold", "dim", "green", "yellow", "red", "cyan"]
UNWRAPPED = 100_000  # columns
LONGEST = 400_000  # characters of a message: of a recipe with very many mistakes


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


def write_any_text() -> None:
    """Let a stream whose encoding lacks a character show its number in its place, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def styled(text: object, style: Style = "", *, stderr: bool = False) -> str:
    """Text as a stream shows it: coloured on a terminal. What a file put into it is shown and not obeyed."""
    where = console(stderr=stderr)
    with where.capture() as capture:
        where.print(Text(showable(str(text), LONGEST), style), soft_wrap=True, end="")
    return capture.get()


def say(text: object, style: Style = "", *, stderr: bool = False) -> None:
    """Print a line, or several."""
    print(styled(text, style, stderr=stderr), file=sys.stderr if stderr else sys.stdout, flush=True)


def complain(error: AccelTrainerError) -> None:
    """Print what went wrong, to stderr."""
    interrupted = isinstance(error, Interrupted)
    say(error if interrupted else f"error: {error}", "yellow" if interrupted else "red", stderr=True)


def print_table(
    headers: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    numbers: Iterable[int] = (),
    whole: Iterable[int] = (),
    styles: Sequence[Style] = (),
) -> None:
    """Print rows under headers, aligned by the cells that characters take: two for a Chinese one.

    Args:
        headers: of the columns; where all are empty, no line is spent on them.
        rows: cells of one length with `headers`; None is shown as nothing.
        numbers: positions of columns aligned to the right.
        whole: positions of columns that a narrow terminal may not cut, such as names. Others end in an ellipsis there.
        styles: of the rows, in order; those left out are plain.
    """
    right, kept, rows = set(numbers), set(whole), [list(row) for row in rows]
    wide = [max(cell_len(str(cell)) for cell in column) for column in zip(headers, *rows, strict=True)]
    table = Table(box=None, show_header=any(headers), header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for i, header in enumerate(headers):
        table.add_column(
            header,
            justify="right" if i in right else "left",
            overflow="ellipsis",
            no_wrap=True,
            min_width=wide[i] if i in kept else None,
        )
    for i, row in enumerate(rows):
        cells = (Text("" if cell is None else showable(str(cell), LONGEST)) for cell in row)
        table.add_row(*cells, style=styles[i] if i < len(styles) else "")
    where = console()
    with where.capture() as capture:
        where.print(table)
    for line in capture.get().splitlines():  # rich fills every line up to the last column's width
        print(line.rstrip(" "))


def gib(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, the first column to the left, the others to the right, without colours."""
    rows = [[showable(cell, LONGEST) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        gaps = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        numbers = (gap + cell for cell, gap in zip(row[1:], gaps[1:], strict=True))
        lines.append("  ".join([row[0] + gaps[0], *numbers]).rstrip())
    return "\n".join(lines)

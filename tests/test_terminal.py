"""What people read: aligned, coloured on a terminal alone, and never obeyed by it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from accel_trainer import terminal
from accel_trainer.errors import Interrupted, UserError

ROWS = [["imdb/distilbert", "好", 0.93], ["a", None, 12], ["很好吃的饭店", "x\ty", -1.5]]


def test_a_table_is_aligned_by_cells_and_not_wrapped_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_table(["recipe", "text", "number"], [*ROWS, ["long", "w" * 500, 1]], numbers=[2], styles=["", "red"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert "\x1b" not in "".join(lines)
    assert {cell_len(line) for line in lines} == {cell_len(lines[0])}  # the last column ends every line
    assert cell_len(lines[3].split("x\\ty")[0]) == cell_len(lines[1].split("好")[0])


@given(st.lists(st.lists(st.text(max_size=8), min_size=3, max_size=3), min_size=1, max_size=5))
def test_columns_to_the_right_end_together(rows: list[list[str]]) -> None:
    lines = terminal.aligned([*rows, ["", "", "#" * 60]]).splitlines()
    assert len(lines) == len(rows) + 1 or any("\n" in cell for row in rows for cell in row)
    wide = {cell_len(line) for line, row in zip(lines, rows, strict=False) if row[2].strip() == row[2] != ""}
    if len(lines) == len(rows) + 1:
        assert wide <= {cell_len(lines[-1])}


@pytest.mark.parametrize("escape", ["\x1b[31mred", "bell\a", "\u202eturned"])
def test_a_terminal_obeys_nothing_that_a_file_holds(escape: str, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say(escape)
    terminal.print_table(["", ""], [[escape, 1]])
    terminal.complain(UserError(escape))
    print(terminal.aligned([[escape, "1"]]))
    said = capsys.readouterr()
    assert not set("\x1b\a\u202e") & set(said.out + said.err)


def test_what_went_wrong_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.complain(UserError("no [such] file"))
    terminal.complain(Interrupted("stopped"))
    assert capsys.readouterr() == ("", "error: no [such] file\nstopped\n")


def on_a_terminal(**environment: str) -> str:
    """What a program writes to a terminal of 40 columns."""
    ours, theirs = pty.openpty()
    program = (
        "from accel_trainer.terminal import *; from accel_trainer.errors import UserError; "
        "complain(UserError('bad')); print_table(['a'], [['b' * 50]])"
    )
    plain = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    subprocess.run(
        [sys.executable, "-c", program],
        stdout=theirs,
        stderr=theirs,
        env={**plain, "TERM": "xterm", "COLUMNS": "40", **environment},
        check=True,
    )
    os.close(theirs)
    try:
        return os.read(ours, 10_000).decode()
    finally:
        os.close(ours)


def test_colours_where_there_is_a_terminal_that_wants_them() -> None:
    screen = on_a_terminal()
    assert "\x1b[31merror: bad" in screen
    assert f"{'b' * 39}…" in screen  # a row stays a line; a pipe has all of it
    assert "\x1b[31m" not in on_a_terminal(NO_COLOR="1")
    assert "\x1b" not in on_a_terminal(TERM="dumb")


def test_a_stream_that_lacks_a_character_shows_its_number() -> None:
    program = "from accel_trainer.terminal import *; write_any_text(); say('好'); complain(ValueError('好'))"
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "\\u597d\n", "error: \\u597d\n")


def test_bytes_as_people_read_them() -> None:
    assert terminal.gib(3 * 2**30) == "3.00 GiB"
    assert terminal.gib(5 * 2**20) == "5.0 MiB"

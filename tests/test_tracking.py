"""Lines where nobody looks at a terminal, a bar where somebody does."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from harness import user_environment

from accel_trainer import tracking
from accel_trainer.tracking import Progress, clock, logger, print_scores, speak_on

LINE = {"step": 2, "epoch": 0.25, "loss": 0.61234, "learning_rate": 5e-4, "grad_norm": 1.0, "tokens": 100}
PROGRAM = f"""
from accel_trainer.tracking import Progress, speak_on, logger
speak_on(True)
progress = Progress(4, 0, main_process=True)
for step in range(4):
    progress.step(100)
progress.log({LINE!r})
logger.info("a message")
progress.close()
"""


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (750, "12:30"), (11100, "3:05:00"), (3600, "1:00:00")],
)
def test_clock(seconds: float, said: str) -> None:
    assert clock(seconds) == said


class Clock:
    """Time that passes when a test says so."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock_at(monkeypatch: pytest.MonkeyPatch) -> Clock:
    own = Clock()
    monkeypatch.setattr(tracking, "time", own)
    return own


def test_without_a_terminal_there_are_lines(capsys: pytest.CaptureFixture[str], clock_at: Clock) -> None:
    """400 tokens in two steps of 0.1 seconds; what was done between them is not counted."""
    speak_on(True)
    progress = Progress(8, 0, main_process=True)
    clock_at.now += 0.1
    progress.step(100)
    clock_at.now += 0.5
    progress.resume()  # after an evaluation, say
    clock_at.now += 0.1
    progress.step(300)
    progress.log(LINE)
    progress.close()
    shown = capsys.readouterr().err
    assert shown.startswith("step 2/8  epoch 0.25  loss 0.6123  lr 5.00e-04  tokens/s 2,000  left 0:01")
    assert shown.count("\n") == 1
    assert "\r" not in shown


def test_a_resumed_run_counts_from_where_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    speak_on(True)
    progress = Progress(8, 5, main_process=True)
    progress.step(10)
    progress.log(LINE)
    assert "step 6/8" in capsys.readouterr().err


def test_speed_and_time_left(capsys: pytest.CaptureFixture[str], clock_at: Clock) -> None:
    """Speed is that of the steps since the last line, the time left by the mean of all steps of this start."""
    speak_on(True)
    progress = Progress(1000, 500, main_process=True)
    for seconds, tokens in ((1.0, 50), (3.0, 150)):
        for _ in range(10):
            clock_at.now += seconds
            progress.step(tokens)
        progress.log(LINE)
    first, second = capsys.readouterr().err.splitlines()
    assert "step 510/1000" in first
    assert "tokens/s 50 " in first
    assert first.endswith("left 8:10")  # 490 steps of 1 second
    assert "tokens/s 50 " in second
    assert second.endswith("left 16:00")  # 480 steps of 2 seconds


def test_scores_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_scores({"validation": {"loss": 0.25, "accuracy": 0.5}, "test": {"loss": 1.0, "f1": 0.125}})
    assert capsys.readouterr().out.splitlines() == [
        "",
        "              loss  accuracy      f1",
        "validation  0.2500    0.5000",
        "test        1.0000            0.1250",
    ]
    print_scores({})
    assert capsys.readouterr().out == ""


def test_other_processes_say_only_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    speak_on(False)
    progress = Progress(8, 0, main_process=False)
    progress.step(10)
    progress.log(LINE)
    progress.close()
    logger.info("chatter")
    logger.error("trouble")
    assert capsys.readouterr().err.strip() == "trouble"
    speak_on(True)
    assert logger.level == logging.INFO
    assert len(logger.handlers) == 1


def test_with_a_terminal_there_is_a_bar(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stderr=theirs,
        stdout=subprocess.PIPE,
        env=user_environment(tmp_path),
        cwd=tmp_path,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    assert "training: 100%" in text
    assert "4/4" in text
    assert "loss=0.6123" in text
    assert "step 4/4" not in text
    assert "a message" in [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]

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

from accel_trainer.tracking import Progress, clock, logger, speak_on

LINE = {"step": 2, "epoch": 0.25, "loss": 0.61234, "learning_rate": 5e-4, "grad_norm": 1.0, "tokens": 100}
PROGRAM = f"""
from accel_trainer.tracking import Progress, speak_on, logger
speak_on(True)
progress = Progress(4, 0, main_process=True)
for step in range(4):
    progress.step()
progress.log({LINE!r}, 12345.6)
logger.info("a message")
progress.close()
"""


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (750, "12:30"), (11100, "3:05:00"), (3600, "1:00:00")],
)
def test_clock(seconds: float, said: str) -> None:
    assert clock(seconds) == said


def test_without_a_terminal_there_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    speak_on(True)
    progress = Progress(8, 0, main_process=True)
    progress.step()
    progress.step()
    progress.log(LINE, 12345.6)
    progress.close()
    shown = capsys.readouterr().err
    assert shown.startswith("step 2/8  epoch 0.25  loss 0.6123  lr 5.00e-04  tokens/s 12,346  left 0:0")
    assert shown.count("\n") == 1
    assert "\r" not in shown


def test_a_resumed_run_counts_from_where_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    speak_on(True)
    progress = Progress(8, 5, main_process=True)
    progress.step()
    progress.log(LINE, 1.0)
    assert "step 6/8" in capsys.readouterr().err


def test_other_processes_say_only_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    speak_on(False)
    progress = Progress(8, 0, main_process=False)
    progress.step()
    progress.log(LINE, 1.0)
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

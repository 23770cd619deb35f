"""Launches: what they tell, and that nothing of them outlives an interruption."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from accel_trainer.errors import Interrupted
from accel_trainer.launching import LAST_LINES, launched
from accel_trainer.signals import interrupted_by_signals

# A launcher that starts a program, says so, and waits for it.
PARENT = """
import subprocess, sys
from pathlib import Path
code = "import sys, time; time.sleep(20); open(sys.argv[1], 'w')"
child = subprocess.Popen([sys.executable, "-c", code, sys.argv[2]])
Path(sys.argv[1]).write_text(str(child.pid))
child.wait()
"""


def test_exit_code_last_lines_and_environment() -> None:
    code = "import os, sys; print('out'); sys.stderr.write(os.environ['SAID'] * 100); sys.exit(7)"
    ended, said = launched([sys.executable, "-c", code], {**os.environ, "SAID": "word\n"})
    assert (ended, said) == (7, "\n".join(["word"] * LAST_LINES))


def test_what_is_shown_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr)"
    assert launched([sys.executable, "-c", code], shown=True) == (0, "")
    out, err = capfd.readouterr()
    assert out == ""
    assert sorted(err.split()) == ["err", "out"]


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_all_that_it_started_ends_with_it(tmp_path: Path) -> None:
    told, finished = tmp_path / "pid", tmp_path / "finished"

    def interrupt(_number: int, _frame: object) -> None:
        if told.exists() and told.read_text():
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        with pytest.raises(Interrupted), interrupted_by_signals():
            launched([sys.executable, "-c", PARENT, str(told), str(finished)])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    end = time.monotonic() + 10
    while is_alive(int(told.read_text())) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_alive(int(told.read_text()))
    assert not finished.exists()

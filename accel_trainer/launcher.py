"""The first moments of a process, before torch is imported, which takes seconds: its launcher, and signals.

So this module imports nothing that takes long.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from accel_trainer.errors import EXIT_INTERRUPTED

NAMES = ("accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run")
PR_SET_PDEATHSIG = 1  # of sys/prctl.h


def is_launcher(process: int) -> bool:
    """Whether the command of a process is a launcher's. Linux only; elsewhere False."""
    with suppress(OSError):
        words = os.fsdecode(Path(f"/proc/{process}/cmdline").read_bytes()).split("\0")
        return any(Path(word).name in NAMES for word in words[:6])  # an interpreter and its options come before it
    return False


def follow_launcher() -> None:
    """Ask this process to stop (SIGTERM) when its launcher dies, so that no training goes on that nobody watches.

    A launcher of one process that is killed, by SIGTERM even, tells its process nothing; one of several that gets SIGKILL
    neither. A process that was started without a launcher may outlive its shell: that is what `nohup` is for. Linux only.
    """
    parent = os.getppid()
    if sys.platform == "linux" and is_launcher(parent):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died in between
            os.kill(os.getpid(), signal.SIGTERM)


def leave_on_signals() -> None:
    """Until the program listens itself, let a signal end it as one would later, with nothing done and nothing written.

    For a program of this package alone (`python -m accel_trainer.…`): whoever imports it has signals of his own.
    """
    if sys.argv[:1] == ["-m"]:  # what stands there until Python has found the module
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _leave)


def _leave(_number: int, _frame: FrameType | None) -> None:
    os.write(2, b"interrupted before anything was done; run the same line again\n")
    os._exit(EXIT_INTERRUPTED)

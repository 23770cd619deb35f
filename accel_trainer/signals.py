"""Signals: a run that is asked to stop ends where all processes agree on, or at once where nothing is under way.

The death of the launcher counts as one.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator

from accel_trainer.errors import Interrupted

AGREEMENT = 1.0  # seconds between two times that the processes ask each other; a scheduler's grace is 30 or more
IMPATIENCE = 3.0  # seconds after which a second Ctrl-C means "now"; a launcher and a terminal may both send the first
PR_SET_PDEATHSIG = 1  # of sys/prctl.h
LAUNCHERS = ("accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run")
# What only launchers set, and what tells a process whose launcher died early from one that init started.
LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND")


class StopSignal(KeyboardInterrupt):
    """A signal where no step is under way. No `except Exception` of a library may take it for a failure of its own."""


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a run to stop. A closed terminal does, unless `nohup` said that it should not."""
    asking = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        asking.append(signal.SIGHUP)
    return asking


@contextmanager
def handling(handler: Any) -> Iterator[None]:
    """Let `handler` answer the stop signals while the block lasts. Only a main thread can; in others nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in stop_signals()}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def interrupted_by_signals(*, resumable: bool = True) -> Iterator[None]:
    """Turn the stop signals into `Interrupted` while the block lasts.

    Raises:
        Interrupted: wherever the block is when the signal comes.
    """

    def interrupt(_number: int, _frame: object) -> None:
        raise StopSignal

    try:
        with handling(interrupt):
            yield
    except StopSignal as stop:
        raise Interrupted("interrupted; run the same line again" + " with --resume" * resumable) from stop


def follow_launcher() -> None:
    """Ask this process to stop when its launcher dies, so that no training goes on that nobody watches. Linux only.

    A launcher of one process that is killed, by SIGTERM even, tells its process nothing; one of several that gets SIGKILL
    neither. A process that was started without a launcher may outlive its shell: that is what `nohup` is for.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    if _is_launcher(parent):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        orphaned = os.getppid() != parent  # it died in between
    else:
        orphaned = parent == 1 and any(name in os.environ for name in LAUNCHED)  # or before
    if orphaned:
        os.kill(os.getpid(), signal.SIGTERM)


def _is_launcher(process: int) -> bool:
    with suppress(OSError):
        words = os.fsdecode(Path(f"/proc/{process}/cmdline").read_bytes()).split("\0")
        return any(Path(word).name in LAUNCHERS for word in words[:6])  # an interpreter and its options come before it
    return False


class _Pace:
    """Counts calls between two agreements; the same on all processes."""

    def __init__(self) -> None:
        self.interval, self.calls = 1, 0
        self.agreed_at = time.monotonic()


class StopRequest:
    """Whether someone asked the run to stop while the block lasts.

    Asking again changes nothing, since schedulers and launchers repeat themselves; but a second Ctrl-C after some seconds
    breaks off at once.
    """

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._steps = _Pace()
        self._handling = handling(self._note)

    def __enter__(self) -> Self:
        self._handling.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._handling.__exit__(*error)

    def _note(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._asked_at is not None and now - self._asked_at > IMPATIENCE:
            raise StopSignal
        self._asked_at = now if self._asked_at is None else self._asked_at

    def agreed(self, accelerator: Accelerator, *, now: bool = False) -> bool:
        """Whether any process was asked to stop; the same answer on all of them. To be asked once per step.

        Several processes agree about once in `AGREEMENT` seconds and not at every step, because that waits for the device.
        Collective then.

        Args:
            accelerator: the run's.
            now: after the last step, or whatever else all of them know to be worth it.
        """
        return self._agreed(accelerator, self._steps, now=now)

    def between(self, accelerator: Accelerator) -> Callable[[], None]:
        """What to call between the micro-batches of an evaluation, on every process: it has a pace of its own.

        The function raises `Interrupted` on all of them at the same call, if any was asked to stop.
        """
        pace = _Pace()

        def check() -> None:
            if self._agreed(accelerator, pace, now=False):
                raise Interrupted("interrupted while evaluating; continue with --resume")

        return check

    def _agreed(self, accelerator: Accelerator, pace: _Pace, *, now: bool) -> bool:
        if accelerator.num_processes == 1:
            return self._asked_at is not None
        pace.calls += 1
        if pace.calls < pace.interval and not now:
            return False
        at = time.monotonic()
        mine = [float(self._asked_at is not None), (at - pace.agreed_at) / pace.calls]
        asked, seconds = accelerator.reduce(torch.tensor(mine, device=accelerator.device), "sum").tolist()
        seconds_per_call = max(seconds / accelerator.num_processes, 1e-6)
        pace.interval, pace.calls, pace.agreed_at = min(max(int(AGREEMENT / seconds_per_call), 1), 100), 0, at
        return bool(asked > 0)

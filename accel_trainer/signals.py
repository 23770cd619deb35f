"""Signals: a run that is asked to stop ends where all processes agree on, or at once where nothing is under way."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Self

import torch
from accelerate import Accelerator

from accel_trainer.errors import AccelTrainerError, Interrupted

AGREEMENT = 1.0  # seconds between two times that the processes ask each other; a scheduler's grace is 30 or more
LONGEST = 100  # calls between two such times
IMPATIENCE = 3.0  # seconds after which a second Ctrl-C means "now"; a launcher and a terminal may both send the first


class StopSignal(KeyboardInterrupt):
    """A signal where no step is under way. No `except Exception` of a library may take it for a failure of its own."""


@cache
def stop_signals() -> list[signal.Signals]:
    """The signals that ask a run to stop. A closed terminal does, unless `nohup` said, at the start, that it should not."""
    asking = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        asking.append(signal.SIGHUP)
    return asking


def ignore_stop_signals() -> None:
    """For a process that has nothing else to do: from here on a signal is heard only where something listens.

    Schedulers and launchers repeat themselves, into the last moments of a process, whose exit code they then spoil.
    """
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


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
        Interrupted: wherever the block is when the signal comes, unless it is ending with an error of its own: that is to
            be told, though a launcher stops all processes as soon as one has ended with it.
    """

    def interrupt(_number: int, _frame: object) -> None:
        if not isinstance(sys.exception(), AccelTrainerError):
            raise StopSignal

    try:
        with handling(interrupt):
            yield
    except StopSignal as stop:
        many = int(os.environ.get("WORLD_SIZE", "1")) > 1
        raise Interrupted(
            "interrupted; run the same line again"
            + " with --resume" * resumable
            + " (if another process died, it is named below)" * many
        ) from stop


class _Pace:
    """Calls between two agreements, so that they are `AGREEMENT` seconds apart; the same number on all processes."""

    def __init__(self) -> None:
        self.interval, self.calls = 1, 0
        self.agreed_at = time.monotonic()


class StopRequest:
    """Whether someone asked the run to stop while the block lasts.

    Asking again changes nothing, since schedulers and launchers repeat themselves; but a Ctrl-C some seconds after the first
    request breaks off at once.
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
        """Whether any process was asked to stop; the same answer on all of them. To be asked after every step.

        Several processes agree about once in `AGREEMENT` seconds and not at every step, because that waits for the device.
        Collective then.

        Args:
            accelerator: the run's.
            now: agree whatever the pace: after the last step, and after what took long.
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
        pace.calls += not now  # what is asked in between, after a save perhaps, tells nothing of the pace
        if pace.calls < pace.interval and not now:
            return False
        at = time.monotonic()
        mine = [float(self._asked_at is not None), (at - pace.agreed_at) / max(pace.calls, 1)]
        asked, seconds = accelerator.reduce(torch.tensor(mine, device=accelerator.device), "sum").tolist()
        if not now:
            wanted = int(AGREEMENT / max(seconds / accelerator.num_processes, 1e-6))
            # Not much longer than the last: the first call comes before anything was done that takes time.
            pace.interval, pace.calls, pace.agreed_at = min(max(wanted, 1), 2 * pace.interval, LONGEST), 0, at
        return bool(asked > 0)

"""Signals: a run that is asked to stop ends at a step all processes agree on, or at once where no step is under way."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from accelerate import Accelerator

from accel_trainer.errors import Interrupted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGREEMENT = 1.0  # seconds between two times that the processes ask each other; a scheduler's grace is 30 or more
IMPATIENCE = 3.0  # seconds after which a second Ctrl-C means "now"; a launcher and a terminal may both send the first


class StopSignal(KeyboardInterrupt):
    """A signal where no step is under way. No `except Exception` of a library may take it for a failure of its own."""


@contextmanager
def interrupted_by_signals(*, resumable: bool = True) -> Iterator[None]:
    """Turn SIGTERM and SIGINT into `Interrupted` while the block lasts.

    Raises:
        Interrupted: wherever the block is when the signal comes.
    """

    def interrupt(_number: int, _frame: object) -> None:
        raise StopSignal

    before = {number: signal.signal(number, interrupt) for number in STOP_SIGNALS}
    try:
        yield
    except StopSignal as stop:
        raise Interrupted("interrupted; run the same line again" + " with --resume" * resumable) from stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Whether someone asked the run to stop, by SIGTERM or SIGINT, while the block lasts.

    Asking again changes nothing, since schedulers and launchers repeat themselves; but a second Ctrl-C after some seconds
    breaks off at once.
    """

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._interval, self._steps = 1, 0  # steps between agreements, and since the last: the same on all processes
        self._agreed_at = time.monotonic()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._asked_at is not None and kind is None:  # after the last step had agreed to go on
            raise Interrupted("interrupted after the last step; run the same line again with --resume")

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
        if accelerator.num_processes == 1:
            return self._asked_at is not None
        self._steps += 1
        if self._steps < self._interval and not now:
            return False
        at = time.monotonic()
        mine = [float(self._asked_at is not None), (at - self._agreed_at) / self._steps]
        asked, seconds = accelerator.reduce(torch.tensor(mine, device=accelerator.device), "sum").tolist()
        seconds_per_step = max(seconds / accelerator.num_processes, 1e-6)
        self._interval, self._steps, self._agreed_at = min(max(int(AGREEMENT / seconds_per_step), 1), 100), 0, at
        return bool(asked > 0)

"""Signals: a run that is asked to stop ends at a step all processes agree on, or at once where no step is under way."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from accelerate import Accelerator

from accel_trainer.errors import Interrupted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into `Interrupted` while the block lasts.

    Raises:
        Interrupted: wherever the block is when the signal comes.
    """

    def interrupt(_number: int, _frame: object) -> None:
        raise Interrupted("interrupted; run the same line again with --resume")

    before = {number: signal.signal(number, interrupt) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Whether someone asked the run to stop, by SIGTERM or SIGINT, while the block lasts; a second signal is not caught."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._restore()
        if self._asked and kind is None:  # after the last step had agreed to go on
            raise Interrupted("interrupted after the last step; run the same line again with --resume")

    def _note(self, _number: int, _frame: object) -> None:
        self._asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop; the same answer on all of them. Collective."""
        if accelerator.num_processes == 1:
            return self._asked
        asked = torch.tensor([float(self._asked)], device=accelerator.device)
        return bool(accelerator.reduce(asked, "sum").item() > 0)

"""Signals: a run that is asked to stop ends at a step all processes agree on."""

from __future__ import annotations

import signal
from typing import Any, Self

import torch
from accelerate import Accelerator


class StopRequest:
    """Whether someone asked the run to stop, by SIGTERM or SIGINT, while the block lasts; a second signal is not caught."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

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

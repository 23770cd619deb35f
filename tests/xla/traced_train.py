"""`accel_trainer.train` on XLA's own CPU devices, that writes how many graphs were compiled, a line after each step, to COMPILED.

Several of these devices are threads of one process, and need what torch_xla 2.9 does not do for them: what they run together must be
one program, so that they compile in turn; and they abort if one comes ten seconds later than another.

RAGGED=STEP: at that step, counted from 1, something is computed in a shape of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_model as xm

from accel_trainer import train as trainer
from accel_trainer import xla
from accel_trainer.run import TrainerState

TURN = threading.Lock()
MEETING = threading.Barrier(int(os.environ.get("CPU_NUM_DEVICES", "1")))
begin = torch_xla._XLAC._xla_step_marker


def in_turn(*arguments: Any, **named: Any) -> None:
    with TURN:
        begin(*arguments, **named)


def together(collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        torch_xla.sync()
        xm.wait_device_ops()
        MEETING.wait()
        result = collective(*arguments, **named)
        in_turn(torch_xla._XLAC._xla_get_default_device(), [], wait=False)
        MEETING.wait()  # to drop a collective's token waits for its end, with the interpreter's lock
        return result

    return call


def add(state: TrainerState, done: Any) -> None:
    added(state, done)
    if str(state.step) == os.environ.get("RAGGED"):
        torch.zeros(state.step + 100, device=done.loss_sum.device).sin_().cpu()
    if "COMPILED" in os.environ and xla.process_index() == 0:
        with Path(os.environ["COMPILED"]).open("a") as file:
            print(xla.compilations(), file=file)


def main() -> int:
    return trainer.main()


added, TrainerState.add = TrainerState.add, add  # type: ignore[method-assign]


torch_xla._XLAC._xla_step_marker = in_turn
if MEETING.parties > 1:
    xm.all_gather, xm.all_reduce = together(partial(xm.all_gather, pin_layout=False)), together(xm.all_reduce)

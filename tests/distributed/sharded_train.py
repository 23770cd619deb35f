"""The trainer with FSDP on processors, which Accelerate refuses and torch does not; it says what each process holds."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from accel_trainer import collectives, train
from accel_trainer.signals import ignore_stop_signals

begin = PartialState.__init__


def begin_as_on_cards(state: PartialState, *arguments: Any, **named: Any) -> None:
    """Say MULTI_GPU, which `ACCELERATE_USE_FSDP` makes FSDP of."""
    begin(state, *arguments, **named)
    if state.distributed_type is DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def put_off(*_: Any) -> None:
    raise AssertionError("a gradient that waits for the next micro-batch lies whole on every process")


def held(tensors: Iterable[Tensor]) -> str:
    """How many numbers of the tensors lie here, of how many."""
    found = [tensor for tensor in tensors if tensor.dim()]
    here = sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel() for tensor in found)
    return f"{here}/{sum(tensor.numel() for tensor in found)}"


def telling_finish(run: Any, stop: Any) -> Any:
    parts = sum(isinstance(module, FSDPModule) for module in run.model.modules())
    state = (entry for entries in run.optimizer.state.values() for entry in entries.values())
    told = f"{parts} parts, weights {held(run.model.parameters())}, optimizer {held(state)}"
    print(f"HELD {run.accelerator.process_index}: {told}", file=sys.stderr, flush=True)
    return finish(run, stop)


finish, train.finish = train.finish, telling_finish
Accelerator.no_sync = put_off  # type: ignore[method-assign,assignment]
PartialState.__init__ = begin_as_on_cards  # type: ignore[method-assign]

if __name__ == "__main__":
    ignore_stop_signals()
    collectives.end_process(train.main())

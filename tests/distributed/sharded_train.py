"""The trainer with FSDP on processors: Accelerate refuses them, torch does not."""

from __future__ import annotations

from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from accel_trainer import hardware, train
from accel_trainer.signals import ignore_stop_signals

begin = PartialState.__init__


def begin_as_on_cards(state: PartialState, *arguments: Any, **named: Any) -> None:
    """Say MULTI_GPU, which `ACCELERATE_USE_FSDP` makes FSDP of."""
    begin(state, *arguments, **named)
    if state.distributed_type is DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = begin_as_on_cards  # type: ignore[method-assign]

if __name__ == "__main__":
    ignore_stop_signals()
    hardware.end_process(train.main())

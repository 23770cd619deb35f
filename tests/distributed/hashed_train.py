"""The trainer, which says on every process what weights and what optimizer state it goes on from, and what it ends with."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

from accel_trainer import collectives, finishing, opening, train
from accel_trainer.model import weights_sha256
from accel_trainer.run import optimizer_state
from accel_trainer.signals import ignore_stop_signals


def tell(when: str, run: Any) -> None:
    tensors, values = optimizer_state(run)
    learnt = hashlib.sha256(
        f"{weights_sha256(tensors)} {sorted(values.items())} {run.scheduler.get_last_lr()}".encode()
    )
    state = (
        f"{weights_sha256(run.inputs.model.state_dict())} {learnt.hexdigest()} {run.state.best_step} {run.max_tokens}"
    )
    print(f"HASH {when} {run.accelerator.process_index} step {run.state.step} {state}", file=sys.stderr, flush=True)


def telling_continue(run: Any, *arguments: Any, **keywords: Any) -> None:
    continue_run(run, *arguments, **keywords)
    tell("begins", run)


def telling_best(run: Any) -> int:
    step = take_best_weights(run)
    tell("ends", run)
    return step


continue_run, take_best_weights = opening.continue_run, finishing.take_best_weights
opening.continue_run, finishing.take_best_weights = telling_continue, telling_best

if __name__ == "__main__":
    ignore_stop_signals()
    collectives.end_process(train.main())

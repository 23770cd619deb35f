"""The trainer, disturbed as its environment says, so that a test can meet it where it wants to.

SLOW=steps: a step takes a twentieth of a second more. SLOW=evaluation: a micro-batch of an evaluation takes a fifth of a
second more. SLOW=saving: a file of tensors takes a second more. SLOW=closing: so does the end of a tracker. In the last three
it says in a file that it got there.
POISON=RANK:STEP: on that process the loss of that step, counted from 1, is no number.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from accelerate.tracking import TensorBoardTracker

from accel_trainer import checkpoint, collectives, scoring, train
from accel_trainer.signals import ignore_stop_signals

SLOW = os.environ.get("SLOW", "")


def reached(where: str) -> None:
    Path(f"at-{where}-{os.environ.get('RANK', '0')}").touch()


def slow_evaluation(*arguments: Any, between: Any, **keywords: Any) -> Any:
    def slowly() -> None:
        between()  # first: the first call comes before anything was done
        reached("evaluation")
        time.sleep(0.2)

    return predict_logits(*arguments, between=slowly, **keywords)


def slow_save(*arguments: Any, **keywords: Any) -> None:
    save_file(*arguments, **keywords)
    reached("saving")
    time.sleep(1)


def slow_step(*arguments: Any) -> Any:
    time.sleep(0.05)
    return training_step(*arguments)


def poisoned(run: Any, micro_batches: Any, global_batch_size: int) -> Any:
    rank, step = map(int, os.environ["POISON"].split(":"))
    losses_of = train.example_losses
    if (run.accelerator.process_index, run.state.step + 1) == (rank, step):
        train.example_losses = lambda *arguments: losses_of(*arguments) * float("nan")
    try:
        return add_gradients(run, micro_batches, global_batch_size)
    finally:
        train.example_losses = losses_of


def slow_close(tracker: Any) -> None:
    time.sleep(2)
    finish(tracker)
    reached("closed")


predict_logits, save_file = scoring.predict_logits, checkpoint.save_file
training_step, add_gradients = train.training_step, train.add_gradients
if "POISON" in os.environ:
    train.add_gradients = poisoned
if SLOW == "steps":
    train.training_step = slow_step
elif SLOW == "evaluation":
    scoring.predict_logits = slow_evaluation
elif SLOW == "saving":
    checkpoint.save_file = slow_save
elif SLOW == "closing":
    finish = TensorBoardTracker.finish
    TensorBoardTracker.finish = slow_close

if __name__ == "__main__":
    ignore_stop_signals()
    collectives.end_process(train.main())

"""How fast a recipe runs on this machine, in one process: a few micro-batches of its own model and data, timed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from accel_trainer import checkpoint
from accel_trainer.errors import RunFolderError
from accel_trainer.evaluation import predict_logits
from accel_trainer.run import Run, shapes_of
from accel_trainer.tokenization import Tokens
from accel_trainer.train import GradientOverflow, add_gradients, apply_gradients

PASSES = 3  # that are timed, after one that is not
WRITTEN = 2**28  # bytes at most that are written to learn how fast the disk is


@dataclass(frozen=True)
class Speed:
    """What was measured here, on one process."""

    position: float  # seconds that training computes a token, or padding
    update: float  # seconds that clipping and the optimizer take once per step
    token: float  # seconds that evaluating takes for a token
    saving: float | None  # bytes per second, hashed and flushed to disk; None where nothing can be written


def measure(run: Run, evaluated: Tokens, disk: Path) -> Speed:
    """Take steps of the recipe here, evaluate some rows and write some weights; the run is of no further use.

    Args:
        run: prepared.
        evaluated: of a role's rows, in their order.
        disk: folder beside which the weights are written.
    """
    rows, (parts,) = run.feed.divide(0, run.max_tokens)
    costs = run.feed.split.tokens.costs(packed=run.packed)[rows]
    part = sorted(parts, key=lambda part: int(costs[part.indices].sum()))[len(parts) // 2]
    loaded = run.feed.load(0, rows, [part])
    run.model.train()
    passes, updates = [], []
    for _ in range(1 + PASSES):
        passes.append(timed(run, lambda: add_gradients(run, loaded, len(rows))))
        updates.append(timed(run, lambda: updated(run)))
    return Speed(
        position=float(np.median(passes[1:])) / loaded[0].batch.num_positions,
        update=float(np.median(updates[1:])),
        token=measure_evaluation(run, evaluated),
        saving=measure_saving(run, disk),
    )


def updated(run: Run) -> None:
    """Apply the gradient, or see that it overflows, which in fp16 the first ones do."""
    with suppress(GradientOverflow):
        apply_gradients(run)


def timed(run: Run, work: Callable[[], object]) -> float:
    """Seconds that some work takes, until the device has done it."""
    started = time.perf_counter()
    work()
    if run.accelerator.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def measure_evaluation(run: Run, tokens: Tokens) -> float:
    """Seconds for each token of the first rows, about a micro-batch of them."""
    count = max(1, int(np.searchsorted(tokens.lengths.cumsum(), run.max_tokens)))
    first = replace(tokens, lengths=tokens.lengths[:count])
    asked, shapes = (run.accelerator, run.model, first, run.max_tokens), shapes_of(run, first)
    seconds = timed(run, lambda: predict_logits(*asked, packed=run.packed, shapes=shapes))
    return seconds / int(first.lengths.sum())


def measure_saving(run: Run, disk: Path) -> float | None:
    """Bytes of weights that a checkpoint writes in a second; None where it cannot."""
    chosen, size = {}, 0
    for name, tensor in run.inputs.model.state_dict().items():
        chosen[name], size = tensor, size + tensor.numel() * tensor.element_size()
        if size > WRITTEN:
            break
    try:
        with tempfile.TemporaryDirectory(prefix=".accel-trainer-plan-", dir=disk) as place:
            return size / timed(run, lambda: checkpoint.save_checkpoint(Path(place), 0, chosen, {}, {}))
    except (OSError, RunFolderError):  # no permission, or no space
        return None

"""Logits of every row of a split, each row exactly once, over all processes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import nn

from accel_trainer import xla
from accel_trainer.batching import MicroBatch, divide_split
from accel_trainer.device_memory import out_of_memory_named
from accel_trainer.shapes import choose_shapes, divide_into
from accel_trainer.sharding import put_back
from accel_trainer.tokenization import Tokens

Logits = npt.NDArray[np.float32]


@torch.no_grad()  # inference mode, which may save a little more, fails on XLA (torch_xla 2.9)
def predict_logits(
    accelerator: Accelerator,
    model: nn.Module,
    tokens: Tokens,
    max_tokens: int,
    *,
    packed: bool,
    between: Callable[[], None] = lambda: None,
) -> Logits:
    """Logits of all rows, on every process.

    The rows are dealt out by `divide`. Nothing but one padded tensor of logits is gathered: which rows a process
    computed follows from the lengths, so that no ids need to travel.

    Args:
        accelerator: the run's.
        model: the prepared classifier; its mode (train or eval) is left as it was.
        tokens: the rows.
        max_tokens: tokens per micro-batch, padding included.
        packed: layout of the micro-batches.
        between: called before each micro-batch, as often on every process; it may raise, on all of them alike.

    Returns:
        shape (rows, num_labels), float32, in the order of the rows.

    Raises:
        OutOfMemory: a micro-batch does not fit.
    """
    was_training = model.training
    model.eval()
    few_shapes = xla.computes_on(accelerator.device) and not packed
    divided = divide(tokens, accelerator.num_processes, max_tokens, packed=packed, few_shapes=few_shapes)
    computed = []
    try:
        for micro_batch in divided[accelerator.process_index]:
            between()
            batch = tokens.batch(micro_batch.indices, packed=packed, length=micro_batch.length)
            batch = batch.pinned_for(accelerator.device)
            with out_of_memory_named(len(micro_batch.indices), batch.num_positions):
                batch = batch.on(accelerator.device)
                logits = model(batch.inputs, packing=batch.packing).float()
            xla.end_graph(accelerator.device)
            computed.append(logits)
    finally:  # training goes on after a repeat in smaller micro-batches
        model.train(was_training)
        put_back(model)
    mine = torch.cat([logits.cpu() for logits in computed])
    sizes = [sum(len(m.indices) for m in part) for part in divided]
    padded = torch.nn.functional.pad(mine, (0, 0, 0, max(sizes) - len(mine))).to(accelerator.device)
    gathered = accelerator.gather(padded).cpu().numpy().reshape(len(divided), max(sizes), -1)
    result = np.empty((len(tokens), gathered.shape[-1]), dtype=np.float32)
    for part, logits in zip(divided, gathered, strict=True):
        counts = np.concatenate([m.weights for m in part]) > 0
        result[np.concatenate([m.real for m in part])] = logits[: len(counts)][counts]
    return result


def divide(
    tokens: Tokens, num_processes: int, max_tokens: int, *, packed: bool, few_shapes: bool
) -> list[list[MicroBatch]]:
    """Micro-batches of all rows by process, the same number for each: `divide_split`, or `divide_into` a few shapes."""
    if few_shapes:
        shapes = choose_shapes(tokens.lengths, len(tokens), num_processes, max_tokens)
        return divide_into(tokens.lengths, num_processes, shapes)
    return divide_split(tokens.costs(packed=packed), num_processes, max_tokens, packed=packed)

"""Logits of every row of a split, each row exactly once, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import nn

from accel_trainer import xla
from accel_trainer.batching import divide_split
from accel_trainer.device_memory import out_of_memory_named
from accel_trainer.shapes import Shape, divide_into
from accel_trainer.sharding import put_back
from accel_trainer.tokenization import Tokens

Logits = npt.NDArray[np.float32]


@torch.no_grad()  # inference mode fails on XLA (torch_xla 2.9)
def predict_logits(
    accelerator: Accelerator,
    model: nn.Module,
    tokens: Tokens,
    max_tokens: int,
    *,
    packed: bool,
    shapes: Sequence[Shape] | None = None,
    between: Callable[[], None] = lambda: None,
) -> Logits:
    """Logits of all rows, on every process.

    The rows are dealt out by `divide_split`, or by `divide_into` to a few shapes. Nothing but one padded tensor of logits is
    gathered: which rows a process computed follows from the lengths, so that no ids need to travel.

    Args:
        accelerator: the run's.
        model: the prepared classifier; its mode (train or eval) is left as it was.
        tokens: the rows.
        max_tokens: tokens per micro-batch, padding included.
        packed: layout of the micro-batches.
        shapes: the few that they may have, padded; None: any.
        between: called before each micro-batch, as often on every process; it may raise, on all of them alike.

    Returns:
        shape (rows, num_labels), float32, in the order of the rows.

    Raises:
        OutOfMemory: a micro-batch does not fit.
    """
    was_training = model.training
    model.eval()
    if shapes is None:
        costs = tokens.costs(packed=packed)
        divided = divide_split(costs, accelerator.num_processes, max_tokens, packed=packed)
    else:
        divided = divide_into(tokens.lengths, accelerator.num_processes, shapes)
    computed = []
    try:
        for micro_batch in divided[accelerator.process_index]:
            between()
            batch = tokens.batch(micro_batch.indices, packed=packed, length=micro_batch.length)
            batch = batch.pinned_for(accelerator.device)
            with out_of_memory_named(len(micro_batch.indices), batch.num_positions):
                batch = batch.on(accelerator.device)
                computed.append(model(batch.inputs, packing=batch.packing).float())
                xla.end_graph(accelerator.device)  # where a full memory shows
    finally:  # training goes on after a repeat in smaller micro-batches
        model.train(was_training)
        put_back(model)
    if xla.computes_on(accelerator.device):  # there, to join them would be another graph for each number of them
        computed = [logits.cpu() for logits in computed]
    mine = torch.cat(computed)
    sizes = [sum(len(m.indices) for m in part) for part in divided]
    padded = torch.nn.functional.pad(mine, (0, 0, 0, max(sizes) - len(mine))).to(accelerator.device)
    gathered = accelerator.gather(padded).cpu().numpy().reshape(len(divided), max(sizes), -1)
    result = np.empty((len(tokens), gathered.shape[-1]), dtype=np.float32)
    for part, logits in zip(divided, gathered, strict=True):
        counts = np.concatenate([m.weights for m in part]) > 0
        result[np.concatenate([m.real for m in part])] = logits[: len(counts)][counts]
    return result

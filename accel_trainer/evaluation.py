"""Logits of every row of a split, each row exactly once, over all processes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import nn

from accel_trainer.batching import divide_split
from accel_trainer.hardware import out_of_memory_named
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

    The rows are dealt out by `divide_split`. Nothing but one padded tensor of logits is gathered: which rows a process
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
    divided = divide_split(tokens.costs(packed=packed), accelerator.num_processes, max_tokens, packed=packed)
    computed = []
    try:
        for micro_batch in divided[accelerator.process_index]:
            between()
            batch = tokens.batch(micro_batch.indices, packed=packed).pinned_for(accelerator.device)
            with out_of_memory_named(len(micro_batch.indices), batch.num_positions):
                batch = batch.on(accelerator.device)
                logits = model(batch.inputs, packing=batch.packing).float()
            if micro_batch.weight:
                computed.append(logits)
            num_labels = logits.shape[-1]
    finally:  # training goes on after a repeat in smaller micro-batches
        model.train(was_training)
        put_back(model)
    shares = [np.concatenate([np.empty(0, np.int64)] + [m.indices for m in part if m.weight]) for part in divided]
    most = max(len(share) for share in shares)
    padded = torch.zeros(most, num_labels, dtype=torch.float32, device=accelerator.device)
    if computed:
        mine = torch.cat(computed)
        padded[: len(mine)] = mine
    gathered = accelerator.gather(padded).cpu().numpy().reshape(len(shares), most, num_labels)
    result = np.empty((len(tokens), num_labels), dtype=np.float32)
    for share, part in zip(shares, gathered, strict=True):
        result[share] = part[: len(share)]
    return result

"""How a global batch is divided over processes and micro-batches: from the lengths alone, without communication.

Every process computes the division for all of them and takes its own part. Every process gets the same number of
micro-batches, because a forward or a backward pass may be a collective and nobody may wait for ever; who has fewer is
given a real example at weight zero. None of this reaches the mathematics: the loss is a sum over examples divided by the
size of the global batch, wherever each example is computed.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

# Tokens (padding included) in one micro-batch, by device type; "measured" on 2 cores, the others are assumptions that
# `--max_tokens_per_device` overrides. The result does not depend on it, only speed and memory do.
CPU_TOKENS = 4096
ACCELERATOR_TOKENS_PER_GIB = 512


@dataclass(frozen=True)
class MicroBatch:
    """Examples that go through the model together.

    `indices` (examples,) point into what was divided: a global batch, or a whole split.
    """

    indices: Indices
    weight: float = 1.0  # 0.0 for a filler: it takes part in every collective and in no result


def token_budget(device_type: str, memory_bytes: int | None) -> int:
    """Tokens per micro-batch when the user gives no `--max_tokens_per_device`.

    Args:
        device_type: `cpu`, `cuda`, `mps`, …
        memory_bytes: total memory of the smallest device of the run, None where unknown.
    """
    if device_type == "cpu" or memory_bytes is None:
        return CPU_TOKENS
    return max(CPU_TOKENS, int(memory_bytes / 2**30 * ACCELERATOR_TOKENS_PER_GIB))


def _pack(indices: Indices, lengths: Indices, max_tokens: int) -> list[Indices]:
    """Cut `indices`, longest first, into micro-batches of similar length within the budget.

    A micro-batch costs its number of examples × its longest length, since padding is computed like text. An example
    longer than the budget stands alone.
    """
    ordered = indices[np.argsort(-lengths[indices], kind="stable")]
    packed, start = [], 0
    while start < len(ordered):
        size = max(1, max_tokens // max(1, int(lengths[ordered[start]])))
        packed.append(ordered[start : start + size])
        start += size
    return packed


def _fill(per_process: list[list[MicroBatch]], filler: int) -> list[list[MicroBatch]]:
    """Bring every process to the largest number of micro-batches, with the example `filler` at weight zero."""
    most = max(len(micro_batches) for micro_batches in per_process)
    idle = MicroBatch(np.asarray([filler], dtype=np.int64), weight=0.0)
    return [micro_batches + [idle] * (most - len(micro_batches)) for micro_batches in per_process]


def divide_batch(lengths: Indices, num_processes: int, max_tokens: int) -> list[list[MicroBatch]]:
    """Divide one global batch: balanced by tokens, longest example first to the least loaded process (LPT).

    Args:
        lengths: tokens of each example of the global batch, shape (examples,).
        num_processes: processes that share the batch.
        max_tokens: tokens per micro-batch, padding included.

    Returns:
        Micro-batches by process, the same number for each.
    """
    assert len(lengths) > 0
    loads = [(0, process) for process in range(num_processes)]
    shares: list[list[int]] = [[] for _ in range(num_processes)]
    for index in np.argsort(-lengths, kind="stable"):
        load, process = loads[0]
        shares[process].append(int(index))
        heapq.heapreplace(loads, (load + int(lengths[index]), process))
    packed = [_pack(np.asarray(share, dtype=np.int64), lengths, max_tokens) for share in shares]
    return _fill([[MicroBatch(indices) for indices in part] for part in packed], filler=int(np.argmin(lengths)))


def divide_split(lengths: Indices, num_processes: int, max_tokens: int) -> list[list[MicroBatch]]:
    """Divide a whole split for evaluation or prediction: every row once, micro-batches dealt out in turn.

    Arguments and result are those of `divide_batch`; rows are sorted by length, so that little padding is computed.
    """
    assert len(lengths) > 0
    packed = _pack(np.arange(len(lengths), dtype=np.int64), lengths, max_tokens)
    dealt = [[MicroBatch(indices) for indices in packed[process::num_processes]] for process in range(num_processes)]
    return _fill(dealt, filler=int(np.argmin(lengths)))

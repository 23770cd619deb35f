"""How a global batch is divided over processes and micro-batches: from the lengths alone, without communication.

Every process computes the division for all of them and takes its own part. Every process gets the same number of
micro-batches, because a forward or a backward pass may be a collective and nobody may wait for ever; who has fewer is
given a real example at weight zero. There are two layouts: packed, where a micro-batch costs its tokens, and padded, where it
costs its number of examples × its longest, since padding is computed like text. None of this reaches the mathematics: the loss
is a sum over examples divided by the size of the global batch, wherever each example is computed.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

# Tokens (padding included) in one micro-batch, if memory allows. On 2 cores 4,096 was the fastest of 512 to 8,192; that more
# than 32,768 gain nothing on an accelerator is an assumption. The result does not depend on it, only speed and memory do.
CPU_TOKENS = 4096
ACCELERATOR_TOKENS = 32768

# Share of the memory that weights and activations may take by the estimate, which is rough.
USABLE = 0.6
LEAST_TOKENS = 512  # which budgets are multiples of: below it something else must give, see `--gradient_checkpointing`

# What one more micro-batch costs beside its tokens (launches, an optimizer's hooks), in tokens; assumption.
OVERHEAD = 64

# Lengths that the rows of a split are padded to, so that XLA and compilers see few shapes. On movie reviews 16 compute 4 % of
# padding by themselves, 8 compute 8 %.
SHAPES = 16


@dataclass(frozen=True)
class MicroBatch:
    """Examples that go through the model together.

    `indices` (examples,) point into what was divided: a global batch, or a whole split.
    """

    indices: Indices
    fillers: int = 0  # so many of the examples, the last, take part in every collective and in no result
    length: int | None = None  # tokens that each is padded to; None: as many as the longest takes

    @property
    def real(self) -> Indices:
        """The examples without the fillers, (examples - fillers,)."""
        return self.indices[: len(self.indices) - self.fillers]

    @property
    def weights(self) -> npt.NDArray[np.float32]:
        """0 for a filler, 1 for all others, (examples,)."""
        return (np.arange(len(self.indices)) < len(self.real)).astype(np.float32)


def token_budget(device_type: str, memory_bytes: int | None, weights_bytes: int, bytes_per_token: int) -> int:
    """Tokens per micro-batch when the user gives no `--max_tokens_per_device`.

    Args:
        device_type: `cpu`, `cuda`, `mps`, …
        memory_bytes: total memory of the smallest device of the run, None where unknown.
        weights_bytes: what stays in memory: weights, their gradients, the optimizer's state.
        bytes_per_token: activations that a forward pass keeps.
    """
    most = CPU_TOKENS if device_type == "cpu" or memory_bytes is None else ACCELERATOR_TOKENS
    if memory_bytes is None:
        return most
    fitting = int((USABLE * memory_bytes - weights_bytes) / bytes_per_token)
    return max(LEAST_TOKENS, min(most, fitting // LEAST_TOKENS * LEAST_TOKENS))


def smaller_budget(max_tokens: int, tokens: int) -> int:
    """The token budget halved until a micro-batch of so many tokens, which did not fit, is cut."""
    assert tokens > 1
    while max_tokens >= tokens:
        max_tokens //= 2
    return max_tokens


def _cutter(ordered: Indices, *, packed: bool) -> Callable[[int], list[int]]:
    """Return the function that cuts lengths into stretches: from a capacity to the end of each, in order.

    A stretch takes what goes into the capacity before the next begins; an example that is longer stands alone. Since the
    longest come first, with a higher capacity no stretch ends earlier, and there are never more of them.

    Args:
        ordered: lengths, longest first, shape (examples,).
        packed: a stretch costs the sum of its lengths; otherwise their number × the longest, its first.
    """
    # Views, because their items are Python's integers, which loops in Python count with several times faster.
    if packed:
        totals = np.cumsum(ordered).data

        def cut(capacity: int) -> list[int]:
            ends, end, before = [], 0, 0
            while end < len(ordered):
                end = max(end + 1, bisect_right(totals, before + capacity, lo=end))
                before = totals[end - 1]
                ends.append(end)
            return ends
    else:
        longest = np.maximum(ordered, 1).data

        def cut(capacity: int) -> list[int]:
            ends, end = [], 0
            while end < len(ordered):
                end += capacity // longest[end] or 1
                ends.append(end)
            ends[-1] = len(ordered)
            return ends

    return cut


def _cut_evenly(cut: Callable[[int], list[int]], stretches: int, max_tokens: int) -> list[int]:
    """Cut into at most `stretches`, which the budget must allow, the largest as small as it gets."""
    return cut(1 + bisect_left(range(1, max_tokens), -stretches, key=lambda capacity: -len(cut(capacity))))


def _pieces(indices: Indices, ends: Sequence[int]) -> list[Indices]:
    return [indices[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _padded_costs(ordered: Indices, ends: Sequence[int]) -> Indices:
    """Count the positions that each stretch of `ordered` lengths, longest first, computes; shape (stretches,)."""
    starts = np.asarray([0, *ends[:-1]])
    costs: Indices = (np.asarray(ends) - starts) * ordered[starts]
    return costs


def _padded_stretches(ordered: Indices, num_processes: int, max_tokens: int) -> list[int]:
    """Cut a batch into k stretches per process, with the k that takes the least time; return their ends.

    A higher k pays more for micro-batches and computes less padding. It goes up from the least that the budget allows
    until no division can be better; above 16 in steps of a sixteenth, because the time is flat near its least.

    The time is what `deal` makes of the stretches if processes wait for each other in every round, as with FSDP. Where
    they wait only at the end it is no longer. The number times the largest would be much too long: the last round is
    often cheap (8 processes, 64 IMDB-like lengths: chose divisions 5 % slower; measured).
    """
    cut = _cutter(ordered, packed=False)
    least_tokens = max(int(ordered[0]), int(ordered.sum()) / num_processes)
    k = -(-len(cut(max_tokens)) // num_processes)
    best: list[int] = []
    least = float("inf")
    while least_tokens + k * OVERHEAD < least:
        ends = _cut_evenly(cut, k * num_processes, max_tokens)
        dearest = np.sort(_padded_costs(ordered, ends))[::-num_processes]  # of each round
        time = int(dearest.sum()) + len(dearest) * OVERHEAD
        if time < least:
            best, least = ends, time
        k += 1 + k // 16
    return best


def deal(costs: Indices, num_processes: int) -> list[list[int]]:
    """Deal out in rounds, dearest first, in each round the dearest to the process with the smallest load.

    One each per round keeps the numbers equal, and what the processes compute at the same time costs about the same.
    """
    order = np.argsort(-costs, kind="stable").tolist()
    loads = [0] * num_processes
    hands: list[list[int]] = [[] for _ in range(num_processes)]
    for start in range(0, len(order), num_processes):
        by_load = sorted(range(num_processes), key=loads.__getitem__)
        for process, item in zip(by_load, order[start : start + num_processes], strict=False):
            loads[process] += int(costs[item])
            hands[process].append(item)
    return hands


def _shares(order: Indices, lengths: Indices, num_processes: int) -> list[Indices]:
    """Balance by tokens: the longest example first, to the process with the smallest load (LPT)."""
    loads = [(0, process) for process in range(num_processes)]
    shares: list[list[int]] = [[] for _ in range(num_processes)]
    for index in order.tolist():
        load, process = loads[0]
        shares[process].append(index)
        heapq.heapreplace(loads, (load + int(lengths[index]), process))
    return [np.asarray(share, dtype=np.int64) for share in shares]


def _fill(per_process: list[list[MicroBatch]], filler: int) -> list[list[MicroBatch]]:
    """Bring every process to the largest number of micro-batches, with the example `filler` at weight zero."""
    most = max(len(micro_batches) for micro_batches in per_process)
    idle = MicroBatch(np.asarray([filler], dtype=np.int64), fillers=1)
    return [micro_batches + [idle] * (most - len(micro_batches)) for micro_batches in per_process]


def divide_batch(lengths: Indices, num_processes: int, max_tokens: int, *, packed: bool) -> list[list[MicroBatch]]:
    """Divide one global batch, balanced by what is computed: tokens if packed, padding included if not.

    Padded, each micro-batch is a stretch of the batch in order of length, so that rows of like length go together and
    little padding is computed. Packed, a process takes any rows and its micro-batches have about equally many tokens.

    Args:
        lengths: tokens of each example of the global batch, shape (examples,).
        num_processes: processes that share the batch.
        max_tokens: cost of a micro-batch at most, unless it is one example.
        packed: a micro-batch costs its tokens; otherwise its number of examples × its longest.

    Returns:
        Micro-batches by process, the same number for each.
    """
    assert len(lengths) > 0
    order = np.argsort(-lengths, kind="stable")
    if packed:
        shares = _shares(order, lengths, num_processes)
        cutters = [_cutter(lengths[share], packed=True) for share in shares]
        most = max(len(cut(max_tokens)) for cut in cutters)  # for all of them: a pass of its own rows costs no filler
        pairs = zip(shares, cutters, strict=True)
        parts = [_pieces(share, _cut_evenly(cut, most, max_tokens)) for share, cut in pairs]
    else:
        ends = _padded_stretches(lengths[order], num_processes, max_tokens)
        pieces = _pieces(order, ends)
        hands = deal(_padded_costs(lengths[order], ends), num_processes)
        parts = [[pieces[item] for item in hand] for hand in hands]
    return _fill([[MicroBatch(indices) for indices in part] for part in parts], filler=int(np.argmin(lengths)))


def divide_split(lengths: Indices, num_processes: int, max_tokens: int, *, packed: bool) -> list[list[MicroBatch]]:
    """Divide a whole split for evaluation or prediction: every row once, micro-batches dealt out in turn.

    Arguments and result are those of `divide_batch`. Micro-batches are stretches of the split in order of length, as
    few as the budget allows for the busiest process and no larger than that takes: a small split occupies all processes.
    """
    assert len(lengths) > 0
    order = np.argsort(-lengths, kind="stable")
    cut = _cutter(lengths[order], packed=packed)
    rounds = -(-len(cut(max_tokens)) // num_processes)
    pieces = _pieces(order, _cut_evenly(cut, rounds * num_processes, max_tokens))
    dealt = [[MicroBatch(indices) for indices in pieces[process::num_processes]] for process in range(num_processes)]
    return _fill(dealt, filler=int(np.argmin(lengths)))


def padded_lengths(lengths: Indices, most: int = SHAPES) -> Indices:
    """Choose the few lengths that the rows of a split are padded to, so that the least padding is computed.

    Args:
        lengths: tokens of each row of the split, shape (rows,).
        most: how many to choose at most.

    Returns:
        ascending, shape (min(most, distinct lengths),); the longest is the last. Of all such choices the one with the
        least total, if each row takes the next of them that is not below its length.
    """
    assert len(lengths) > 0
    assert most >= 1
    counts = np.bincount(lengths)
    values = np.flatnonzero(counts)
    most = min(most, len(values))
    rows = np.concatenate([[0], np.cumsum(counts[values])])  # of the shortest 0, 1, … distinct lengths
    # least[m, j]: the total of the shortest j distinct lengths, padded to m of them, the last of these among the m;
    # before[m, j]: how many distinct lengths there are up to the one chosen before that.
    least = np.full((most + 1, len(values) + 1), np.inf)
    least[0, 0] = 0
    before = np.zeros(least.shape, dtype=np.int64)
    for j, value in enumerate(values, start=1):
        totals = least[:-1, :j] + (rows[j] - rows[:j]) * value
        before[1:, j] = totals.argmin(axis=1)
        least[1:, j] = totals.min(axis=1)
    chosen, j = [], len(values)
    for m in range(most, 0, -1):
        chosen.append(values[j - 1])
        j = before[m, j]
    return np.asarray(chosen[::-1], dtype=np.int64)

"""Few shapes for padded micro-batches, known before anything is computed: XLA compiles its program once for each of them.

A shape fixes rows and columns. Rows of a batch take them in order of length, the longest first, and what a shape has room for
beyond them is filled with rows that count for nothing. So any batch, the short last one of an epoch too, is computed in the
shapes that were chosen for the run, and what each step uses and divides by stays the recipe's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from accel_trainer.batching import OVERHEAD, Indices, MicroBatch, deal, padded_lengths

Shape = tuple[int, int]  # rows, tokens that each is padded to

MOST = 8  # shapes of a split
SAMPLES = 16  # batches that choices are tried on
SAMPLED = 16384, 64  # rows of a whole split that they are tried on, and micro-batches of each process: the larger
WORTH = 0.03  # of the time, which one more shape must save


def choose_shapes(lengths: Indices, batch_size: int, num_processes: int, max_tokens: int) -> list[Shape]:
    """Choose the shapes that the micro-batches of a split are computed in, the same on every process.

    The lengths are those of `padded_lengths`, for each number of them up to `MOST`. Each gets as many rows as a process's share
    of a batch is expected to have of it, or half, or a quarter, as a power of two within the budget. What computes sampled
    batches in the least time is taken, where another shape must save more than it is worth.

    Args:
        lengths: tokens of each row of the split, shape (rows,).
        batch_size: rows that are computed together: the global batch, or the whole split.
        num_processes: processes that share a batch.
        max_tokens: rows × length of a shape at most, unless it has one row.

    Returns:
        ascending by length; the last takes the longest row.
    """
    assert len(lengths) > 0
    draw = np.random.default_rng(0)
    if batch_size < len(lengths):
        samples = [draw.choice(lengths, batch_size, replace=False) for _ in range(SAMPLES)]
    else:  # of a long split a part will do: the shapes that take the least time for it do so for all of it
        batch_size = len(lengths)
        size = max(SAMPLED[0], int(SAMPLED[1] * num_processes * max_tokens / lengths.mean()))
        samples = [lengths if size >= len(lengths) else draw.choice(lengths, size, replace=False)]
    best: list[Shape] = []
    least = np.inf
    for number in range(1, MOST + 1):
        columns = padded_lengths(lengths, number)
        counts = np.bincount(np.searchsorted(columns, lengths), minlength=len(columns))
        expected = counts * (batch_size / len(lengths) / num_processes)
        found, time = _best_rows(expected, columns, samples, num_processes, max_tokens)
        if time < least * (1 - WORTH) ** (len(found) - len(best)):
            best, least = found, time
    return best


def _best_rows(
    expected: npt.NDArray[np.floating],
    columns: Indices,
    samples: Sequence[Indices],
    num_processes: int,
    max_tokens: int,
) -> tuple[list[Shape], float]:
    """The best numbers of rows for some lengths, of which a process's share has about `expected`, and the time in tokens."""
    tried = []
    for part in (1, 2, 4):
        rows = [
            min(_power_of_two(max(1.0, count / part)), max(1, max_tokens // int(column)))
            for count, column in zip(expected, columns, strict=True)
        ]
        found = list(zip(rows, columns.tolist(), strict=True))
        tried.append((sum(_time(sample, num_processes, found) for sample in samples), found))
    time, found = min(tried)
    return found, time


def _power_of_two(count: float) -> int:
    """The nearest power of two: on a scale of ratios, that is."""
    return 1 << int(np.rint(np.log2(count)))


def _time(lengths: Indices, num_processes: int, shapes: Sequence[Shape]) -> int:
    """What a batch takes, in tokens: in each round, processes wait for the one with the largest shape."""
    rounds = zip(*divide_into(lengths, num_processes, shapes), strict=True)
    return sum(max(len(part.indices) * (part.length or 0) for part in busiest) + OVERHEAD for busiest in rounds)


def fixed_shapes(longest: int, max_tokens: int) -> list[Shape]:
    """Shapes for rows that nobody has seen yet: their longest, halved again and again, each filling the budget."""
    columns = sorted({max(1, longest >> halvings) for halvings in range(MOST)})
    return [(max(1, max_tokens // column), column) for column in columns]


def divide_into(lengths: Indices, num_processes: int, shapes: Sequence[Shape]) -> list[list[MicroBatch]]:
    """Divide a global batch, or a split, into micro-batches of these shapes and no others.

    Args:
        lengths: tokens of each example, shape (examples,).
        num_processes: processes that share them.
        shapes: of `choose_shapes`, for rows at least as long.

    Returns:
        Micro-batches by process, the same number for each; those of a process in order of cost, then what it only fills.
    """
    assert len(lengths) > 0
    order = np.argsort(-lengths, kind="stable")
    pieces, start = [], 0
    while start < len(order):
        rows, length = _next(shapes, int(lengths[order[start]]), len(order) - start)
        pieces.append(_filled(order[start : start + rows], rows, length))
        start += rows
    costs = np.asarray([len(piece.indices) * (piece.length or 0) for piece in pieces])
    hands = [[pieces[item] for item in hand] for hand in deal(costs, num_processes)]
    rows, length = _next(shapes, int(lengths[order[-1]]), 1)
    idle = MicroBatch(np.full(rows, order[-1]), fillers=rows, length=length)
    most = max(map(len, hands))
    return [hand + [idle] * (most - len(hand)) for hand in hands]


def _next(shapes: Sequence[Shape], longest: int, examples: int) -> Shape:
    """The shape for the longest of the examples that are left: the cheapest that takes them all, else the shortest."""
    fitting = [shape for shape in shapes if shape[1] >= longest]
    for_all = [shape for shape in fitting if shape[0] >= examples]
    return min(for_all, key=lambda shape: shape[0] * shape[1]) if for_all else fitting[0]


def _filled(indices: Indices, rows: int, length: int) -> MicroBatch:
    """A micro-batch of a shape: after its own examples, its shortest again and again."""
    fillers = rows - len(indices)
    return MicroBatch(np.concatenate([indices, np.full(fillers, indices[-1])]), fillers=fillers, length=length)

"""What a process computes of each optimizer step, as tensors, made ready while the step before is computed.

A step's work is a function of its number alone, so that it can be made ahead, thrown away and made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor

from accel_trainer import batching, dropout, order
from accel_trainer.data import Split
from accel_trainer.recipe import TrainingSection
from accel_trainer.shapes import Shape, divide_into
from accel_trainer.tokenization import Batch


@dataclass(frozen=True)
class LoadedMicroBatch:
    """A micro-batch as tensors. Legend: b examples."""

    batch: Batch
    labels: Tensor  # (b,) int64
    example_keys: Tensor  # (b, 4), see `dropout.example_keys`
    weights: Tensor  # (b,) float32, 0 for a filler

    def on(self, device: torch.device) -> LoadedMicroBatch:
        """The same on its device, as `Batch.on`."""
        tensors, free = (self.labels, self.example_keys, self.weights), device.type == "cuda"
        return LoadedMicroBatch(self.batch.on(device), *(tensor.to(device, non_blocking=free) for tensor in tensors))


@dataclass(frozen=True)
class StepSize:
    """What a step computes, over all processes."""

    examples: int  # of the global batch
    tokens: int  # real tokens of the global batch
    positions: int  # tokens computed for it, padding included, and whatever fills the few shapes where there are few
    padded_positions: int  # examples × the longest of them


@dataclass(frozen=True)
class StepWork(StepSize):
    """One process's share of a step, and the size of the whole."""

    micro_batches: Sequence[LoadedMicroBatch]


@dataclass
class Feed:
    """The work of one process of a run, step by step."""

    split: Split
    training: TrainingSection
    num_processes: int
    process_index: int
    packed: bool
    device: torch.device  # where it will be computed
    few_shapes: bool = False  # padded to a few shapes that are known beforehand, since each is compiled
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "feed"), init=False, repr=False)
    _ahead: tuple[tuple[int, int], Future[StepWork]] | None = field(default=None, init=False, repr=False)

    def take(self, step: int, max_tokens: int) -> StepWork:
        """The work of a step at a token budget; that of the next is begun."""
        asked = (step, max_tokens)
        ready = self._ahead[1].result() if self._ahead and self._ahead[0] == asked else self.work(step, max_tokens)
        self._ahead = (step + 1, max_tokens), self._thread.submit(self.work, step + 1, max_tokens)
        return ready

    def work(self, step: int, max_tokens: int) -> StepWork:
        """The work of a step at a token budget."""
        rows, divided = self.divide(step, max_tokens)
        micro_batches = self.load(step, rows, divided[self.process_index])
        return StepWork(micro_batches=micro_batches, **asdict(self.size(rows, divided)))

    def size(self, rows: order.Rows, divided: Sequence[Sequence[batching.MicroBatch]]) -> StepSize:
        """What the rows of a step compute, divided so."""
        lengths, costs = self.split.tokens.lengths[rows], self.split.tokens.costs(packed=self.packed)[rows]
        # Elsewhere a process that has nothing to do computes one short row, which does not count.
        counted = [part for parts in divided for part in parts if self.few_shapes or len(part.real)]
        return StepSize(
            examples=len(rows),
            tokens=int(lengths.sum()),
            positions=sum(
                int(costs[part.indices].sum())
                if self.packed
                else len(part.indices) * (part.length or int(costs[part.indices].max()))
                for part in counted
            ),
            padded_positions=len(rows) * int(lengths.max()),
        )

    def divide(self, step: int, max_tokens: int) -> tuple[order.Rows, list[list[batching.MicroBatch]]]:
        """Rows of the global batch of a step, and the micro-batches of each process, which point into them."""
        rows = order.global_batch(
            step,
            seed=self.training.seed,
            num_examples=len(self.split),
            global_batch_size=self.training.global_batch_size,
        )
        if self.few_shapes:
            return rows, divide_into(self.split.tokens.lengths[rows], self.num_processes, self.shapes(max_tokens))
        costs = self.split.tokens.costs(packed=self.packed)[rows]
        return rows, batching.divide_batch(costs, self.num_processes, max_tokens, packed=self.packed)

    def shapes(self, max_tokens: int) -> list[Shape]:
        """The few shapes that micro-batches have at a token budget."""
        return self.split.tokens.shapes(self.training.global_batch_size, self.num_processes, max_tokens)

    def load(self, step: int, rows: order.Rows, micro_batches: Sequence[batching.MicroBatch]) -> list[LoadedMicroBatch]:
        """Micro-batches of a step as tensors."""
        loaded = []
        for micro_batch in micro_batches:
            taken = rows[micro_batch.indices]
            batch = self.split.tokens.batch(taken, packed=self.packed, length=micro_batch.length).pinned_for(
                self.device
            )
            labels = torch.from_numpy(np.asarray(self.split.rows.labels[taken]))
            keys = dropout.example_keys(taken, seed=self.training.seed, step=step)
            tensors = [labels, keys, torch.from_numpy(micro_batch.weights)]
            if self.device.type == "cuda":
                tensors = [tensor.pin_memory() for tensor in tensors]
            loaded.append(LoadedMicroBatch(batch, *tensors))
        return loaded

"""Print what share of a training step its matrix products alone would take: how near we are to what the machine can do.

python benchmarks/limit.py --sst2 FILE.tsv --imdb FILE.parquet --tokenizer FOLDER --threads 2

Whole optimizer steps of the packed layout (tokens, dropout, loss, backward, clipping, AdamW) and the bare matrix products
of the same micro-batches take turns in one process, in blocks of `--steps` steps; the options are those of `training.py`.
The products work on tensors made beforehand, contiguous as `nn.Linear` has them, into results made beforehand, with
weights of their own for every layer, and nothing between them.

Counted for a micro-batch of n examples of lengths ℓ, T = Σ ℓ real tokens, width d, inner width f, h heads:

- a layer over all tokens: q, k, v, out (d × d), lin1 (d × f), lin2 (f × d), each on T rows: x Wᵀ, dY W and dYᵀ x; attention
  of each example, h × (ℓ × d/h): 2 products forward (Q Kᵀ, P V), 4 backward (Pᵀ dO, dO Vᵀ, dS K, dSᵀ Q), examples of equal
  length in one batched product. FLOPs: 6 (4 d² + 2 d f) T + 12 d Σ ℓ²
- the last layer where a classifier needs it, which is at the first token of each example: k and v on T rows; q, out, lin1,
  lin2 on n rows; attention with one query each. FLOPs: 6 · 2 d² T + 6 (2 d² + 2 d f) n + 12 d Σ ℓ
- the head: pre_classifier and classifier on n rows. FLOPs: 6 (d² + 2 d) n

That is a multiplication and an addition of each weight and row, times 3: forward, and backward to the input and to the
weight. The embeddings, softmax, and everything that fused attention computes a second time are not counted.

- share of the limit, needed: seconds of the products with the last layer reduced ÷ seconds of the step
- share of the limit, whole model: seconds of the products with the last layer over all tokens ÷ seconds of the step. It is
  model FLOPs of the step per second ÷ FLOPs per second of the products, the usual model FLOPs utilisation with what the
  machine reaches on these shapes in the place of its data sheet. A step that leaves out what nobody needs can exceed 1
- at the rate of the linear layers: FLOPs needed ÷ (FLOPs per second of the linear layers alone × seconds of the step), which
  holds attention's small products against us as well
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from training import Bench, Block, add_options, benches, describe, heading, our_run, synchronise

from accel_trainer import order, train
from accel_trainer.run import Run

# Groups of products that are timed apart.
BODY, BODY_ATTENTION = "all layers but the last, linear", "all layers but the last, attention"
LAST, LAST_ATTENTION = "last layer, linear", "last layer, attention"
FIRST, FIRST_ATTENTION = "last layer at the first tokens, linear", "last layer at the first tokens, attention"
HEAD = "head"
STEP, OPTIMIZER = "step", "of it the optimizer"
NEEDED = (BODY, BODY_ATTENTION, FIRST, FIRST_ATTENTION, HEAD)
WHOLE = (BODY, BODY_ATTENTION, LAST, LAST_ATTENTION, HEAD)
LINEAR = (BODY, FIRST, HEAD)  # of the needed

Numbers = dict[str, float]  # seconds or FLOPs by group
Product = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a DistilBERT."""

    layers: int
    width: int
    inner: int
    heads: int
    labels: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's linear modules."""
        d, f = self.width, self.inner
        return {**dict.fromkeys(("q", "k", "v", "out"), (d, d)), "lin1": (d, f), "lin2": (f, d)}


class Room:
    """Numbers to multiply, and room for products."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._tensors: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Return a contiguous tensor; those of one name share their memory."""
        size = int(np.prod(shape))
        if name not in self._tensors or len(self._tensors[name]) < size:
            self._tensors[name] = torch.randn(size, device=self.device, dtype=self.dtype)
        return self._tensors[name][:size].view(shape)


def linear(room: Room, weight: str, rows: int, inputs: int, outputs: int) -> Iterator[Product]:
    """Yield the products of a linear module: forward, to its input, to its weight."""
    w = room(weight, outputs, inputs)
    x, dy = room("x", rows, inputs), room("dy", rows, outputs)
    yield partial(torch.mm, x, w.t(), out=room("y", rows, outputs))
    yield partial(torch.mm, dy, w, out=room("dx", rows, inputs))
    yield partial(torch.mm, dy.t(), x, out=room("dw", outputs, inputs))


def attend(room: Room, sizes: Sizes, examples: int, queries: int, length: int) -> Iterator[Product]:
    """Yield the products of attention of examples of one length, each with so many queries: 2 forward, 4 backward."""
    b, e = examples * sizes.heads, sizes.width // sizes.heads
    q, do = room("q", b, queries, e), room("do", b, queries, e)
    k, v = room("k", b, length, e), room("v", b, length, e)
    p, ds = room("p", b, queries, length), room("ds", b, queries, length)
    yield partial(torch.bmm, q, k.mT, out=room("s", b, queries, length))
    yield partial(torch.bmm, p, v, out=room("o", b, queries, e))
    yield partial(torch.bmm, p.mT, do, out=room("dv", b, length, e))
    yield partial(torch.bmm, do, v.mT, out=room("dp", b, queries, length))
    yield partial(torch.bmm, ds, k, out=room("dq", b, queries, e))
    yield partial(torch.bmm, ds.mT, q, out=room("dk", b, length, e))


def products(room: Room, sizes: Sizes, lengths: order.Rows) -> dict[str, list[Product]]:
    """Return the products of a micro-batch, by group."""
    n, tokens, last = len(lengths), int(lengths.sum()), sizes.layers - 1
    alike = [(int(count), int(length)) for length, count in zip(*np.unique(lengths, return_counts=True), strict=True)]

    def layer(number: int, rows: Mapping[str, int]) -> list[Product]:
        shapes = sizes.linears.items()
        return [p for name, shape in shapes for p in linear(room, f"{name} {number}", rows[name], *shape)]

    every = dict.fromkeys(sizes.linears, tokens)
    at_first = {**dict.fromkeys(sizes.linears, n), "k": tokens, "v": tokens}
    over_all = [p for count, length in alike for p in attend(room, sizes, count, length, length)]
    return {
        BODY: [p for number in range(last) for p in layer(number, every)],
        BODY_ATTENTION: over_all * last,
        LAST: layer(last, every),
        LAST_ATTENTION: over_all,
        FIRST: layer(last, at_first),
        FIRST_ATTENTION: [p for count, length in alike for p in attend(room, sizes, count, 1, length)],
        HEAD: [
            *linear(room, "pre_classifier", n, sizes.width, sizes.width),
            *linear(room, "classifier", n, sizes.width, sizes.labels),
        ],
    }


def flops(sizes: Sizes, lengths: order.Rows) -> Numbers:
    """Count the FLOPs of a micro-batch, by group, as the formulas above have them."""
    d, f, n, tokens = sizes.width, sizes.inner, len(lengths), int(lengths.sum())
    everywhere, attention = 6 * (4 * d * d + 2 * d * f) * tokens, 12 * d * int((lengths**2).sum())
    return {
        BODY: (sizes.layers - 1) * everywhere,
        BODY_ATTENTION: (sizes.layers - 1) * attention,
        LAST: everywhere,
        LAST_ATTENTION: attention,
        FIRST: 6 * 2 * d * d * tokens + 6 * (2 * d * d + 2 * d * f) * n,
        FIRST_ATTENTION: 12 * d * tokens,
        HEAD: 6 * (d * d + d * sizes.labels) * n,
    }


def sizes_of(run: Run) -> Sizes:
    """Return the sizes of a run's model."""
    config = run.inputs.model.config
    return Sizes(config.n_layers, config.dim, config.hidden_dim, config.n_heads, len(run.inputs.label_names))


def micro_batches(run: Run, block: Block) -> list[order.Rows]:
    """Return the lengths of the examples of each micro-batch of a block."""
    lengths = run.inputs.splits["train"].tokens.lengths
    steps = [run.feed.divide(block.first_step + i, run.max_tokens) for i in range(len(block.batches))]
    return [lengths[rows[part.indices]] for rows, divided in steps for part in divided[0]]


def added(parts: Sequence[Numbers]) -> Numbers:
    """Add up by group."""
    return {group: sum(part[group] for part in parts) for group in parts[0]}


def time_products(room: Room, sizes: Sizes, lengths: Sequence[order.Rows]) -> Numbers:
    """Return the seconds that the products of some micro-batches take, by group."""
    times = []
    for groups in [products(room, sizes, part) for part in lengths]:
        seconds = {}
        for group, members in groups.items():
            started = time.perf_counter()
            for product in members:
                product()
            synchronise()
            seconds[group] = time.perf_counter() - started
        times.append(seconds)
    return added(times)


@dataclass
class OptimizerClock:
    """Times the updates of an optimizer."""

    optimizer: torch.optim.Optimizer
    seconds: float = 0.0
    started: float = 0.0

    def __post_init__(self) -> None:
        self.optimizer.register_step_pre_hook(self.begin)
        self.optimizer.register_step_post_hook(self.end)

    def begin(self, *_: object) -> None:
        synchronise()
        self.started = time.perf_counter()

    def end(self, *_: object) -> None:
        synchronise()
        self.seconds += time.perf_counter() - self.started


def time_steps(run: Run, block: Block, clock: OptimizerClock) -> Numbers:
    """Return the seconds that the steps of a block take."""
    clock.seconds = 0.0
    started = time.perf_counter()
    for i in range(len(block.batches)):
        train.training_step(run, block.first_step + i)
    synchronise()
    return {STEP: time.perf_counter() - started, OPTIMIZER: clock.seconds}


@dataclass(frozen=True)
class Round:
    """What one round told."""

    seconds: Numbers
    flops: Numbers

    def total(self, groups: Sequence[str]) -> float:
        """Return the seconds of some groups."""
        return sum(self.seconds[group] for group in groups)

    def operations(self, groups: Sequence[str]) -> float:
        """Return the FLOPs of some groups."""
        return sum(self.flops[group] for group in groups)

    @property
    def shares(self) -> dict[str, float]:
        """What is printed as a share of the limit."""
        step, rate = self.seconds[STEP], self.operations(LINEAR) / self.total(LINEAR)
        return {
            "**needed**": self.total(NEEDED) / step,
            "whole model": self.total(WHOLE) / step,
            "needed, at the rate of the linear layers": self.operations(NEEDED) / rate / step,
            "needed, of the step without its optimizer": self.total(NEEDED) / (step - self.seconds[OPTIMIZER]),
        }


def measure(bench: Bench) -> list[Round]:
    """Let steps and products take turns, the one first in one round, the others in the next; the first round warms up."""
    run = our_run(bench, "packed")
    sizes, clock = sizes_of(run), OptimizerClock(getattr(run.optimizer, "optimizer", run.optimizer))
    is_bf16 = run.accelerator.mixed_precision == "bf16"
    room = Room(run.accelerator.device, torch.bfloat16 if is_bf16 else torch.float32)
    rounds = []
    for number, block in enumerate(bench.blocks):
        lengths = micro_batches(run, block)
        turns = [partial(time_steps, run, block, clock), partial(time_products, room, sizes, lengths)]
        seconds: Numbers = {}
        for turn in turns if number % 2 else reversed(turns):
            gc.collect()
            seconds |= turn()
        rounds.append(Round(seconds, added([flops(sizes, part) for part in lengths])))
        print(f"{number}/{len(bench.blocks) - 1}: {seconds[STEP]:.2f} s in steps", file=sys.stderr)
    return rounds[1:]


def lines(rounds: Sequence[Round], steps: int) -> Iterator[str]:
    """Yield the lines of a task's two tables."""
    yield "| | GFLOP per step | ms per step | GFLOP/s |"
    yield "|---|---:|---:|---:|"
    rows: dict[str, tuple[Sequence[str], Sequence[str]]] = {  # whose FLOPs, in whose time
        **{group: ((group,), (group,)) for group in dict.fromkeys((*WHOLE, *NEEDED))},
        "products needed": (NEEDED, NEEDED),
        "products of the whole model": (WHOLE, WHOLE),
        "step, products needed": (NEEDED, (STEP,)),
        "step, whole model": (WHOLE, (STEP,)),
        OPTIMIZER: ((), (OPTIMIZER,)),
    }
    for name, (counted, timed) in rows.items():
        seconds = statistics.median(one.total(timed) for one in rounds) / steps
        operations = statistics.mean(one.operations(counted) for one in rounds) / steps
        rates = [one.operations(counted) / one.total(timed) for one in rounds]
        done = f"{operations / 1e9:.2f}" if counted else ""
        rate = f"{statistics.median(rates) / 1e9:.1f}" if counted else ""
        yield f"| {name} | {done} | {1e3 * seconds:.1f} | {rate} |"
    yield ""
    yield "| share of the limit | median | min–max |"
    yield "|---|---:|---:|"
    for name in rounds[0].shares:
        values = [one.shares[name] for one in rounds]
        yield f"| {name} | {statistics.median(values):.3f} | {min(values):.3f}–{max(values):.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    arguments = parser.parse_args()
    for bench in benches(arguments):
        rounds = measure(bench)
        print(f"{heading()}\n\n{describe(bench, arguments)}\n")
        print("\n".join(lines(rounds, arguments.steps)), flush=True)
        print()
        gc.collect()


if __name__ == "__main__":
    main()

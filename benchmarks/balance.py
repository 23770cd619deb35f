"""Print how evenly the global batches of one epoch are divided over processes, for real texts and a real tokenizer.

python benchmarks/balance.py FILE... --tokenizer FOLDER --text_column text [--processes 8] [--global_batch_size 64]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer

from accel_trainer.batching import MicroBatch, divide_batch
from accel_trainer.order import global_batch, steps_per_epoch
from accel_trainer.tables import read_files
from accel_trainer.tokenization import tokens_of_texts

Lengths = npt.NDArray[np.int64]
Division = Callable[[Lengths], list[list[MicroBatch]]]


def read_lengths(files: Sequence[Path], text_column: str, tokenizer: str, max_length: int) -> Lengths:
    """Return the tokens of every row, special tokens included, cut at the maximum."""
    texts = list(read_files(files).data[text_column])
    return tokens_of_texts(AutoTokenizer.from_pretrained(tokenizer), [texts], max_length).lengths


def in_order(lengths: Lengths, num_processes: int) -> list[list[MicroBatch]]:
    """Divide as a loader does that does not look at lengths: to each process the next rows, as many as to the others."""
    parts = np.array_split(np.arange(len(lengths)), num_processes)
    return [[MicroBatch(part)] if len(part) else [] for part in parts]


def tokens(lengths: Lengths, part: Sequence[MicroBatch]) -> int:
    """Count the real tokens of one process's share."""
    return sum(int(lengths[m.indices].sum()) for m in part if len(m.real))


def positions(lengths: Lengths, part: Sequence[MicroBatch], *, packed: bool) -> int:
    """Count what a process computes, fillers included: real tokens, or micro-batches padded to their longest text."""
    rows = [lengths[m.indices] for m in part]
    return sum(int(row.sum()) if packed else len(row) * int(row.max()) for row in rows)


def excess(loads: Sequence[int]) -> float:
    """Return the largest load ÷ the mean load: 1 where all are equal."""
    return max(loads) * len(loads) / sum(loads)


def least(lengths: Lengths, num_processes: int) -> float:
    """Return what no division goes below: the longest example stands somewhere, whole."""
    return max(1.0, float(lengths.max() * num_processes / lengths.sum()))


def summary(ratios: Sequence[float]) -> str:
    """Write median, 95th percentile, maximum and mean as cells."""
    values = (np.median(ratios), np.percentile(ratios, 95), np.max(ratios), np.mean(ratios))
    return " | ".join(f"{value:.3f}" for value in values)


def print_balance(batches: Sequence[Lengths], divisions: Mapping[str, Division], num_processes: int) -> None:
    """Print how far the tokens of the busiest process lie above the mean, whole batches and last ones apart."""
    print("| division | rows in the batch | batches | median | 95 % | max | mean | no division below |")
    print("|---|---|---|---|---|---|---|---|")
    for size in sorted({len(batch) for batch in batches}, reverse=True):
        alike = [batch for batch in batches if len(batch) == size]
        bound = max(least(batch, num_processes) for batch in alike)
        for name, divide in divisions.items():
            ratios = [excess([tokens(batch, part) for part in divide(batch)]) for batch in alike]
            print(f"| {name} | {size} | {len(alike):,} | {summary(ratios)} | {bound:.3f} |")


def print_passes(batches: Sequence[Lengths], divisions: Mapping[str, Division], packed: frozenset[str]) -> None:
    """Print what the division costs in passes through a model that computes padding where there is any."""
    print("| division | micro-batches | fillers | padding | median | 95 % | max | mean |")
    print("|---|---|---|---|---|---|---|---|")
    for name, divide in divisions.items():
        divided = [divide(batch) for batch in batches]
        passes = [micro_batch for parts in divided for part in parts for micro_batch in part]
        fillers = sum(len(micro_batch.real) == 0 for micro_batch in passes) / len(passes)
        pairs = zip(batches, divided, strict=True)
        loads = [[positions(batch, part, packed=name in packed) for part in parts] for batch, parts in pairs]
        padding = 1 - sum(int(batch.sum()) for batch in batches) / sum(map(sum, loads))
        ratios = summary([excess(load) for load in loads])
        print(f"| {name} | {len(passes):,} | {fillers:.1%} | {padding:.1%} | {ratios} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--tokenizer", required=True, help="folder or Hub id")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--global_batch_size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1, help="more of them show rarer batches")
    parser.add_argument("--max_tokens", type=int, nargs="+", default=[4096, 16384], help="budgets of a micro-batch")
    arguments = parser.parse_args()

    lengths = read_lengths(arguments.files, arguments.text_column, arguments.tokenizer, arguments.max_length)
    n, size = len(lengths), arguments.global_batch_size
    batches = [
        lengths[global_batch(step, seed=42, num_examples=n, global_batch_size=size)]
        for step in range(arguments.epochs * steps_per_epoch(n, size))
    ]
    print(
        f"{', '.join(path.name for path in arguments.files)}: {n:,} rows, {lengths.mean():.0f} tokens on average, "
        f"{np.mean(lengths == arguments.max_length):.1%} of them {arguments.max_length} long; global batches of {size}, "
        f"{arguments.processes} processes, {arguments.epochs} epoch{'s'[: arguments.epochs > 1]}; transformers "
        f"{version('transformers')}, tokenizers {version('tokenizers')}, numpy {np.__version__}\n\n"
        "Tokens of the busiest process ÷ mean over the processes, per global batch:\n"
    )
    divisions: dict[str, Division] = {
        f"`divide_batch`, {layout}, {max_tokens:,} tokens": partial(
            divide_batch, num_processes=arguments.processes, max_tokens=max_tokens, packed=layout == "packed"
        )
        for layout in ("packed", "padded")
        for max_tokens in arguments.max_tokens
    }
    packed = frozenset(name for name in divisions if ", packed, " in name)
    divisions["rows in order, padded"] = partial(in_order, num_processes=arguments.processes)
    print_balance(batches, divisions, arguments.processes)
    print(
        "\nPasses through a model, which computes padding too: how many, the share of them that are fillers, the share of padding\n"
        "and fillers in the positions computed, and the positions of the busiest process ÷ mean:\n"
    )
    print_passes(batches, divisions, packed)


if __name__ == "__main__":
    main()

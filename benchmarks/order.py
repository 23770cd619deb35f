"""Print what the order of examples costs: time and memory of a step's rows, beside a permutation of the whole dataset.

python benchmarks/order.py
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from accel_trainer.order import global_batch, steps_per_epoch

SIZES = (10**3, 10**6, 10**9)
BATCHES = (32, 1024)
STEPS = 50  # timed together, since one takes microseconds
ROUNDS = 10  # of STEPS for each case, to see whether the process grows


def machine() -> str:
    """Name the CPU and the versions that the times belong to."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    return (
        f"{cpu}, {torch.get_num_threads()} thread{'s'[: torch.get_num_threads() > 1]}, "
        f"Python {platform.python_version()}, numpy {np.__version__}, torch {version('torch')}"
    )


def take_steps(n: int, batch: int) -> None:
    """Find the rows of some steps, spread over an epoch where it has more, over epochs where it has fewer."""
    stride = max(1, steps_per_epoch(n, batch) // STEPS)
    for k in range(STEPS):
        global_batch(k * stride, seed=42, num_examples=n, global_batch_size=batch)


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of work that uses one core: what else runs on the machine is not in it."""
    started = time.process_time()
    work()
    return time.process_time() - started


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most that Python and numpy hold at once while it works; torch's own memory is not seen."""
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def resident_bytes() -> int:
    """Return the most memory this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def readable(value: float, units: tuple[str, ...], step: float) -> str:
    """Write a number with three digits and the largest unit that leaves it at 1 or above."""
    for unit in units[:-1]:
        if value < step:
            return f"{value:.3g} {unit}"
        value /= step
    return f"{value:.3g} {units[-1]}"


def as_time(value: float) -> str:
    return readable(value * 1e6, ("µs", "ms", "s"), 1000)


def as_memory(value: float) -> str:
    return readable(value / 1024, ("KiB", "MiB", "GiB"), 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="times that each case is measured, in turn")
    parser.add_argument("--largest", type=int, default=10**8, help="rows of the largest whole permutation")
    arguments = parser.parse_args()

    ours = {(n, batch): partial(take_steps, n, batch) for n in SIZES for batch in BATCHES}
    # First, and before anything large: what the process has had at its most can only rise.
    for work in ours.values():
        work()
    before = resident_bytes()
    for work in ours.values():
        for _ in range(ROUNDS):
            work()
    grown = resident_bytes() - before
    peaks = {case: peak_bytes(work) for case, work in ours.items()}

    permutation = np.random.default_rng(42).permutation
    wholes: dict[tuple[str, int], Callable[[], object]] = {}
    for n in (10**6, arguments.largest):
        wholes["torch.randperm", n] = partial(torch.randperm, n)
        wholes["numpy permutation", n] = partial(permutation, n)

    cases: list[Callable[[], object]] = [*ours.values(), *wholes.values()]
    times: list[list[float]] = [[] for _ in cases]
    for _ in range(arguments.repeats):  # in turn, so that a busy moment of the machine meets all of them
        for case, measured in zip(cases, times, strict=True):
            measured.append(seconds(case))
    medians = iter([statistics.median(measured) for measured in times])

    print(f"{machine()}; CPU time, medians of {arguments.repeats}\n")
    print("| order | rows | batch | time of a step | time before the first step | memory |")
    print("|---|---|---|---|---|---|")
    for n, batch in ours:
        print(
            f"| `order.global_batch` | {n:,} | {batch:,} | {as_time(next(medians) / STEPS)} | none | "
            f"{as_memory(peaks[n, batch])} |"
        )
    for name, n in wholes:
        print(f"| `{name}` | {n:,} | any | a slice | {as_time(next(medians))} | {as_memory(8 * n)} |")
    print(
        f"\nMemory: the most that one step holds at once; of a whole permutation, its 8 bytes a row. The largest resident size of "
        f"the\nprocess grew by {as_memory(grown)} in {len(ours) * STEPS * ROUNDS:,} steps of `order.global_batch`, of all sizes."
    )


if __name__ == "__main__":
    main()

"""A step's work is the same whenever, in whatever order and in whichever thread it is made, and no process forgets a row."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import python
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accel_trainer import dropout, order
from accel_trainer.data import Split
from accel_trainer.feed import Feed, LoadedMicroBatch, StepWork
from accel_trainer.recipe import TrainingSection
from accel_trainer.tokenization import Tokens

ROWS, GLOBAL_BATCH, SEED = 53, 8, 3  # seven steps an epoch; the last has five rows
LENGTHS = np.random.default_rng(0).integers(3, 40, ROWS)
TEXTS = [np.random.default_rng(row).integers(5, 50, length).tolist() for row, length in enumerate(LENGTHS)]
LABELS = np.random.default_rng(1).integers(0, 3, ROWS)
TRAINING = TrainingSection(global_batch_size=GLOBAL_BATCH, num_train_epochs=1, learning_rate=1e-3, seed=SEED)

layouts = pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
places = pytest.mark.parametrize("processes", [1, 2, 3])
ASKED = st.tuples(st.integers(0, 20), st.sampled_from([1, 37, 100, 4096]))  # step, tokens of a micro-batch


class Counting(Feed):
    """A feed that notes what it makes, and in which thread; it fails at the steps in `failing`."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.made: list[tuple[int, int, bool]] = []  # step, tokens, whether ahead
        self.failing: set[int] = set()

    def work(self, step: int, max_tokens: int) -> StepWork:
        self.made.append((step, max_tokens, threading.current_thread() is not threading.main_thread()))
        if step in self.failing:
            raise ValueError(f"step {step} cannot be read")
        return super().work(step, max_tokens)

    def wait(self) -> None:
        """Until what was begun is done."""
        assert self._ahead is not None
        with contextlib.suppress(ValueError):
            self._ahead[1].result()


def feed(packed: bool = True, processes: int = 1, process: int = 0, few_shapes: bool = False) -> Counting:
    tokens = Tokens({"input_ids": TEXTS}, LENGTHS, truncated=0, pad_token_id=0)
    rows: Any = type("Rows", (), {"labels": LABELS, "__len__": lambda self: ROWS})()
    split, device = Split(rows, tokens), torch.device("cpu")
    return Counting(split, TRAINING, processes, process, packed=packed, device=device, few_shapes=few_shapes)


def rows_of(step: int) -> order.Rows:
    return order.global_batch(step, seed=SEED, num_examples=ROWS, global_batch_size=GLOBAL_BATCH)


def texts(loaded: LoadedMicroBatch) -> list[tuple[int, ...]]:
    """The examples of a micro-batch, read back from its tensors."""
    ids = loaded.batch.inputs["input_ids"]
    if loaded.batch.packing is not None:
        assert ids.shape == (1, sum(loaded.batch.packing.lengths))
        return [tuple(part.tolist()) for part in ids[0].split(loaded.batch.packing.lengths)]
    mask = loaded.batch.inputs["attention_mask"].bool()
    return [tuple(row[real].tolist()) for row, real in zip(ids, mask, strict=True)]


def plain(value: Any) -> Any:
    """Tensors as lists, so that two pieces of work can be compared."""
    if isinstance(value, Tensor):
        return value.dtype, value.tolist()
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


# --- what is taken


@layouts
@settings(max_examples=25)
@given(st.lists(ASKED, min_size=1, max_size=8))
def test_what_is_taken_is_the_work_of_that_step(packed: bool, asked: list[tuple[int, int]]) -> None:
    """In any order, with jumps and repeats, at any budget: as steps are repeated, overflow, shrink or resume."""
    ours, fresh = feed(packed), feed(packed)
    for step, max_tokens in asked:
        assert plain(ours.take(step, max_tokens)) == plain(fresh.work(step, max_tokens))


@layouts
def test_what_was_made_ahead_is_the_work_of_its_own_step_and_budget(packed: bool) -> None:
    """Every way to leave the order of steps, one after the other, with the work ahead ready each time."""
    ours, fresh = feed(packed), feed(packed)
    for step, max_tokens in [(4, 100), (5, 100), (5, 100), (5, 50), (6, 50), (6, 100), (3, 100), (5, 100), (0, 37)]:
        taken = ours.take(step, max_tokens)
        ours.wait()
        assert plain(taken) == plain(fresh.work(step, max_tokens))


def test_nothing_is_made_twice_in_order() -> None:
    ours = feed()
    for step in range(2, 9):
        ours.take(step, 100)
    ours.wait()
    assert ours.made == [(2, 100, False), *((step, 100, True) for step in range(3, 10))]


def test_the_next_step_is_made_while_this_one_is_computed() -> None:
    ours = feed()
    ours.take(0, 100)
    deadline = time.monotonic() + 30
    while len(ours.made) < 2 and time.monotonic() < deadline:  # nobody asks
        time.sleep(0.01)
    assert ours.made == [(0, 100, False), (1, 100, True)]


def test_a_smaller_budget_costs_one_more() -> None:
    """As after an out-of-memory: the step again and the next one again, and from there in order."""
    ours = feed()
    for step, max_tokens in [(0, 100), (1, 100), (1, 50), (2, 50), (3, 50)]:
        ours.take(step, max_tokens)
    ours.wait()
    assert Counter(made[:2] for made in ours.made) == Counter(
        {(0, 100): 1, (1, 100): 1, (2, 100): 1, (1, 50): 1, (2, 50): 1, (3, 50): 1, (4, 50): 1}
    )


def test_a_step_past_the_end_can_be_made() -> None:
    """The work ahead of the last step is that of a step which will never be taken; it must not fail."""
    ours = feed()
    taken = ours.take(6, 100)
    assert taken.examples == ROWS % GLOBAL_BATCH
    ours.wait()
    assert ours.made[-1] == (7, 100, True)


# --- failures


def test_an_error_ahead_reaches_the_step_it_belongs_to() -> None:
    ours = feed()
    ours.failing = {2}
    ours.take(0, 100)
    ours.take(1, 100)
    ours.wait()  # it has failed by now, and nobody is told before the step is wanted
    with pytest.raises(ValueError, match="step 2 cannot be read"):
        ours.take(2, 100)


def test_an_error_ahead_is_no_concern_of_another_step() -> None:
    ours, fresh = feed(), feed()
    ours.failing = {2}
    ours.take(1, 100)
    assert plain(ours.take(5, 100)) == plain(fresh.work(5, 100))
    ours.failing = set()
    assert plain(ours.take(2, 100)) == plain(fresh.work(2, 100))


def test_an_error_of_the_step_itself_leaves_a_feed_that_works() -> None:
    ours, fresh = feed(), feed()
    ours.failing = {0}
    with pytest.raises(ValueError, match="step 0 cannot be read"):
        ours.take(0, 100)
    ours.failing = set()
    assert plain(ours.take(0, 100)) == plain(fresh.work(0, 100))


# --- what it holds


@layouts
@places
@pytest.mark.parametrize("max_tokens", [1, 60, 4096])
@pytest.mark.parametrize("step", [0, 6, 7])
def test_the_shares_are_the_global_batch(packed: bool, processes: int, max_tokens: int, step: int) -> None:
    """Every row once, its text beside its label and its key; who has fewer micro-batches has fillers at weight 0."""
    works = [feed(packed, processes, process).work(step, max_tokens) for process in range(processes)]
    rows = rows_of(step)
    assert len({len(work.micro_batches) for work in works}) == 1
    keys = dropout.example_keys(rows, seed=SEED, step=step).tolist()
    expected = [(tuple(TEXTS[row]), int(LABELS[row]), tuple(key)) for row, key in zip(rows, keys, strict=True)]
    found, fillers = [], []
    for loaded in [loaded for work in works for loaded in work.micro_batches]:
        assert loaded.weights.tolist() in ([0.0], [1.0] * len(loaded.labels))
        assert loaded.labels.dtype == torch.int64
        parts = zip(texts(loaded), loaded.labels.tolist(), map(tuple, loaded.example_keys.tolist()), strict=True)
        (found if loaded.weights.all() else fillers).extend(parts)
    assert sorted(found) == sorted(expected)
    assert set(fillers) <= set(expected)  # real examples too


@layouts
@places
@pytest.mark.parametrize("max_tokens", [1, 60, 4096])
def test_the_numbers_are_those_of_the_whole_batch(packed: bool, processes: int, max_tokens: int) -> None:
    """Counted here from the tensors of all processes; each of them knows them of all."""
    for step in (1, 6):
        works = [feed(packed, processes, process).work(step, max_tokens) for process in range(processes)]
        real = [loaded for work in works for loaded in work.micro_batches if loaded.weights.any()]
        lengths = LENGTHS[rows_of(step)]
        positions = sum(loaded.batch.inputs["input_ids"].numel() for loaded in real)
        assert positions == lengths.sum() if packed else positions >= lengths.sum()
        for work in works:
            assert work.examples == len(lengths)
            assert work.tokens == lengths.sum()
            assert work.positions == positions
            assert work.padded_positions == len(lengths) * lengths.max()
            assert {type(number) for number in (work.examples, work.tokens, work.positions, work.padded_positions)} == {
                int
            }  # JSON takes them


@settings(max_examples=40)
@given(ASKED, st.integers(1, 5))
def test_in_few_shapes_it_is_the_global_batch_too(asked: tuple[int, int], processes: int) -> None:
    """Fillers stand after the rows, inside a micro-batch, and all that is computed is counted."""
    works = [feed(False, processes, process, few_shapes=True).work(*asked) for process in range(processes)]
    rows, shapes = rows_of(asked[0]), feed(False, processes, few_shapes=True).shapes(asked[1])
    found = []
    for loaded in [loaded for work in works for loaded in work.micro_batches]:
        weights, labels, keys = loaded.weights.tolist(), loaded.labels.tolist(), loaded.example_keys.tolist()
        assert weights == sorted(weights, reverse=True)
        assert tuple(loaded.batch.inputs["input_ids"].shape) in shapes
        parts = zip(weights, texts(loaded), labels, map(tuple, keys), strict=True)
        found += [part for weight, *part in parts if weight]
    keys = dropout.example_keys(rows, seed=SEED, step=asked[0]).tolist()
    expected = [[tuple(TEXTS[row]), int(LABELS[row]), tuple(key)] for row, key in zip(rows, keys, strict=True)]
    assert sorted(found) == sorted(expected)
    positions = sum(loaded.batch.num_positions for work in works for loaded in work.micro_batches)
    assert {work.positions for work in works} == {positions}
    assert len({len(work.micro_batches) for work in works}) == 1


def test_some_of_them_are_filled() -> None:
    """The last step of an epoch has fewer rows than the others."""
    (loaded,) = feed(False, few_shapes=True).work(6, 4096).micro_batches
    assert loaded.weights.tolist() == [1.0] * 5 + [0.0] * 3


def test_on_a_device_it_is_the_same() -> None:
    loaded = feed().work(0, 100).micro_batches[0]
    moved = loaded.on(torch.device("meta"))
    packing = moved.batch.packing
    assert packing is not None
    tensors = [*moved.batch.inputs.values(), moved.labels, moved.example_keys, packing.examples, packing.cu_seqlens]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert plain(loaded.on(torch.device("cpu"))) == plain(loaded)


# --- the thread


def test_the_thread_dies_with_its_feed() -> None:
    before = threading.active_count()
    ours = feed()
    ours.take(0, 100)
    ours.wait()
    assert threading.active_count() == before + 1
    del ours
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


INTERRUPTED = """
import os, signal, sys, threading, time
sys.path.insert(0, {tests!r})
import test_feed
from accel_trainer.feed import Feed

work, begun, released = Feed.work, threading.Event(), threading.Event()

def slow(self, step, max_tokens):
    if step:
        begun.set()
        released.wait(60)
    return work(self, step, max_tokens)

Feed.work = slow
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have this ignored in the background
for case in ("waiting", "computing"):  # two programs for the price of one start: the imports take seconds
    child = os.fork()
    if child == 0:
        break
    started = time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(case, code, time.monotonic() - started < 30, flush=True)
else:
    sys.exit(0)
feed = test_feed.feed()
feed.take(0, 100)
begun.wait()
if case == "waiting":
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        feed.take(1, 100)  # waits for the thread
    finally:
        released.set()
else:
    threading.Timer(0.5, released.set).start()
    raise KeyboardInterrupt
print("never", flush=True)
"""


def test_ctrl_c_ends_the_program(tmp_path: Path) -> None:
    """While it waits for the thread, and while the thread works: nobody waits longer than the work under way takes."""
    done = python(INTERRUPTED.format(tests=str(Path(__file__).parent)), tmp_path)
    assert done.code == 0, done.err
    for line, case in zip(done.out.splitlines(), ("waiting", "computing"), strict=True):
        assert line in (f"{case} -2 True", f"{case} 130 True")
    assert done.err.count("Traceback") == 2
    assert done.err.count("\nKeyboardInterrupt") == 2

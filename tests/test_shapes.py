"""Few shapes: every row once, in no other shape, whatever the batch; and little padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_trainer import shapes as module
from accel_trainer.shapes import MOST, choose_shapes, divide_into, fixed_shapes

LENGTHS = st.lists(st.integers(1, 512), min_size=1, max_size=120).map(lambda drawn: np.asarray(drawn, dtype=np.int64))
PROCESSES, BUDGETS, BATCHES = st.integers(1, 5), st.sampled_from([1, 60, 700, 4096]), st.integers(1, 64)
REVIEWS = np.clip(np.random.default_rng(0).lognormal(5.2, 0.6, 4000).astype(np.int64), 5, 512)


@given(LENGTHS, BATCHES, PROCESSES, BUDGETS, st.integers(0, 2**32))
def test_any_batch_of_a_split_is_computed_in_its_shapes(lengths, batch_size, processes, budget, seed):
    shapes = choose_shapes(lengths, batch_size, processes, budget)
    size = np.random.default_rng(seed).integers(1, min(batch_size, len(lengths)) + 1)  # short, as an epoch's last
    batch = np.random.default_rng(seed).choice(lengths, size, replace=False)
    division = divide_into(batch, processes, shapes)
    assert len(division) == processes
    assert len({len(part) for part in division}) == 1
    used = [int(index) for part in division for micro_batch in part for index in micro_batch.real]
    assert sorted(used) == list(range(size))
    for micro_batch in (micro_batch for part in division for micro_batch in part):
        assert (len(micro_batch.indices), micro_batch.length) in shapes
        assert batch[micro_batch.indices].max() <= micro_batch.length
        assert micro_batch.weights.sum() == len(micro_batch.real)
        assert set(micro_batch.indices) <= set(range(size))  # fillers are real examples too


@given(LENGTHS, BATCHES, PROCESSES, BUDGETS)
def test_shapes_are_few_and_within_the_budget(lengths, batch_size, processes, budget):
    shapes = choose_shapes(lengths, batch_size, processes, budget)
    assert 1 <= len(shapes) <= MOST
    assert [length for _, length in shapes] == sorted({length for _, length in shapes})
    assert shapes[-1][1] == lengths.max()
    assert all(rows == 1 or rows * length <= budget for rows, length in shapes)
    assert shapes == choose_shapes(lengths, batch_size, processes, budget)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [32, 128])
def test_padding_is_little(batch_size, processes):
    """Of reviews, less than a third of what is computed beside tokens; padded to the longest of a batch it is as much as they."""
    shapes = choose_shapes(REVIEWS, batch_size, processes, 4096)
    draw = np.random.default_rng(1)
    tokens = computed = to_longest = 0
    for batch in (draw.choice(REVIEWS, batch_size, replace=False) for _ in range(20)):
        division = divide_into(batch, processes, shapes)
        tokens += batch.sum()
        to_longest += len(batch) * batch.max()
        computed += sum(len(part.indices) * part.length for parts in division for part in parts)
    assert to_longest > 2 * tokens
    assert computed < 1.5 * tokens


def test_a_shape_more_must_be_worth_it():
    assert choose_shapes(np.full(100, 7), 10, 1, 4096) == [(8, 7)]
    assert len(choose_shapes(np.asarray([20] * 99 + [21]), 10, 1, 4096)) == 1


def test_a_whole_split_fills_the_budget():
    shapes = choose_shapes(REVIEWS, len(REVIEWS), 2, 4096)
    assert all(rows == 4096 // length for rows, length in shapes)


@pytest.mark.parametrize("processes", [1, 8])
def test_a_long_split_has_the_shapes_of_a_part_of_it(processes, monkeypatch):
    """Which is all that is divided to find them; or those without a shape that is hardly worth it."""
    divided = []
    monkeypatch.setattr(
        module, "divide_into", lambda lengths, *rest: divided.append(len(lengths)) or divide_into(lengths, *rest)
    )
    many = np.tile(REVIEWS, 25)
    shapes = choose_shapes(many, len(many), processes, 4096)
    assert max(divided) < len(many) / 4
    time = module._time(many, processes, shapes)
    monkeypatch.setattr(module, "SAMPLED", (len(many), 1))
    assert time <= (1 + module.WORTH + 0.01) * module._time(
        many, processes, choose_shapes(many, len(many), processes, 4096)
    )


@given(st.integers(1, 8192), st.sampled_from([1, 60, 4096, 32768]))
def test_shapes_for_any_row(longest, budget):
    shapes = fixed_shapes(longest, budget)
    assert len(shapes) <= MOST
    assert shapes[-1][1] == longest
    assert [length for _, length in shapes] == sorted({length for _, length in shapes})
    assert all(rows == 1 or rows * length <= budget < (rows + 1) * length for rows, length in shapes)

"""A division uses every example once, gives every process the same number of passes, and keeps to the budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_trainer.batching import CPU_TOKENS, MicroBatch, divide_batch, divide_split, token_budget

LENGTHS = st.lists(st.integers(1, 600), min_size=1, max_size=80).map(lambda values: np.asarray(values, dtype=np.int64))
PROCESSES = st.integers(1, 9)
BUDGETS = st.integers(1, 3000)
divisions = pytest.mark.parametrize("divide", [divide_batch, divide_split])


def real(micro_batches):
    return [batch for batch in micro_batches if batch.weight]


@divisions
@given(LENGTHS, PROCESSES, BUDGETS)
def test_every_example_counts_once_whatever_the_machine(divide, lengths, processes, budget):
    division = divide(lengths, processes, budget)
    assert len(division) == processes
    used = [int(index) for part in division for batch in real(part) for index in batch.indices]
    assert sorted(used) == list(range(len(lengths)))
    assert {batch.weight for part in division for batch in part} <= {0.0, 1.0}


@divisions
@given(LENGTHS, PROCESSES, BUDGETS)
def test_every_process_makes_as_many_passes_as_the_busiest_needs(divide, lengths, processes, budget):
    division = divide(lengths, processes, budget)
    assert {len(part) for part in division} == {max(len(real(part)) for part in division)}


@divisions
@given(LENGTHS, PROCESSES, BUDGETS)
def test_a_filler_is_one_short_real_example_after_the_real_ones(divide, lengths, processes, budget):
    for part in divide(lengths, processes, budget):
        fillers = [batch for batch in part if not batch.weight]
        assert part == real(part) + fillers
        for filler in fillers:
            assert filler.indices.shape == (1,)
            assert lengths[filler.indices[0]] == lengths.min()


@divisions
@given(LENGTHS, PROCESSES, BUDGETS)
def test_the_budget_holds_padding_included_and_is_used(divide, lengths, processes, budget):
    for part in divide(lengths, processes, budget):
        for batch in part:
            assert len(batch.indices) >= 1
            assert len(batch.indices) == 1 or len(batch.indices) * lengths[batch.indices].max() <= budget
    # One more example would not have gone in: where another micro-batch of no longer rows follows, the first is full.
    (alone,) = divide(lengths, 1, budget)
    for batch in alone[:-1]:
        assert (len(batch.indices) + 1) * lengths[batch.indices].max() > budget


@divisions
@given(LENGTHS, PROCESSES, BUDGETS)
def test_rows_of_like_length_go_together(divide, lengths, processes, budget):
    for part in divide(lengths, processes, budget):
        for one, two in zip(real(part), real(part)[1:], strict=False):
            assert lengths[one.indices].min() >= lengths[two.indices].max()


@given(LENGTHS, PROCESSES, BUDGETS)
def test_a_global_batch_is_balanced_by_tokens(lengths, processes, budget):
    # Whoever got the last example had the smallest load, which is at most the mean (Graham 1969).
    division = divide_batch(lengths, processes, budget)
    loads = [sum(int(lengths[batch.indices].sum()) for batch in real(part)) for part in division]
    assert max(loads) <= lengths.sum() / processes + lengths.max()


def test_balance_on_lengths_as_they_come():
    # The bound above allows much; on 64 reviews over 4 processes the longest-first rule stays within 2 %.
    lengths = np.random.default_rng(0).integers(10, 500, size=64)
    loads = [sum(int(lengths[b.indices].sum()) for b in part) for part in divide_batch(lengths, 4, 10**9)]
    assert max(loads) <= 1.02 * lengths.sum() / 4


def test_balance_on_long_reviews():
    # Lengths like IMDB's at 512 tokens: log-normal around 230, one in seven cut. On the reviews themselves the largest of
    # 2,480 batches is 3.4 % above the mean (benchmarks/balance.py).
    draw = np.random.default_rng(0)
    for _ in range(200):
        lengths = draw.lognormal(np.log(230), 0.7, size=64).clip(15, 512).astype(np.int64)
        loads = [
            sum(int(lengths[b.indices].sum()) for b in part if b.weight) for part in divide_batch(lengths, 8, 4096)
        ]
        assert max(loads) <= 1.05 * lengths.sum() / 8


@given(LENGTHS, PROCESSES, BUDGETS)
def test_a_split_is_dealt_out_evenly(lengths, processes, budget):
    counts = [len(real(part)) for part in divide_split(lengths, processes, budget)]
    assert max(counts) - min(counts) <= 1


@divisions
@given(LENGTHS, PROCESSES, BUDGETS)
def test_every_process_computes_the_same_division(divide, lengths, processes, budget):
    def plain(division):
        return [[(batch.indices.tolist(), batch.weight) for batch in part] for part in division]

    before = lengths.copy()
    one = plain(divide(lengths, processes, budget))
    assert one == plain(divide(lengths.astype(np.int32).astype(np.int64), processes, budget))
    assert np.array_equal(lengths, before)


@divisions
def test_more_processes_than_examples(divide):
    division = divide(np.asarray([7, 3]), 5, 100)
    assert [len(part) for part in division] == [1] * 5
    assert (
        sorted(batch.weight for part in division for batch in part) == [0.0, 0.0, 0.0, 1.0, 1.0]
        or divide is divide_split
    )
    assert sorted(int(i) for part in division for batch in real(part) for i in batch.indices) == [0, 1]
    assert all(batch.indices.tolist() == [1] for part in division for batch in part if not batch.weight)


@divisions
def test_an_example_longer_than_the_budget_stands_alone(divide):
    (part,) = divide(np.asarray([5, 600, 5, 5]), 1, 20)
    assert [batch.indices.tolist() for batch in part] == [[1], [0, 2, 3]]


@divisions
def test_nothing_cannot_be_divided(divide):
    with pytest.raises(AssertionError):
        divide(np.zeros(0, dtype=np.int64), 2, 100)


def test_a_micro_batch_counts_in_full_unless_said_otherwise():
    assert MicroBatch(np.asarray([0])).weight == 1.0


def test_the_budget_grows_with_the_device_and_never_falls_below_a_cpus():
    assert token_budget("cpu", 10**12) == CPU_TOKENS
    assert token_budget("cuda", None) == CPU_TOKENS
    assert token_budget("cuda", 2**30) == CPU_TOKENS
    assert token_budget("cuda", 80 * 2**30) == 2 * token_budget("cuda", 40 * 2**30) > CPU_TOKENS

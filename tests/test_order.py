"""The order is a permutation that looks random, depends on its key alone, and costs what is asked of it."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_trainer import order
from accel_trainer.hashing import Purpose
from accel_trainer.order import global_batch, permute, shuffled, steps_per_epoch, stratified, subset

KEYS = st.lists(st.integers(0, 2**64 - 1), max_size=4)


def images(n, *key):
    return permute(np.arange(n), n, *key)


@pytest.mark.parametrize("start", range(1, 301, 50))
def test_every_small_size_is_permuted(start):
    for n in range(start, start + 50):
        assert sorted(images(n, Purpose.TRAINING, 42, n)) == list(range(n))


# Squares, their neighbours, primes and powers of two: where halves are equal, nearly equal, or most is walked through.
@pytest.mark.parametrize("n", [1023, 1024, 1025, 4095, 9973, 10_000, 10_001, 65_537, 99_856, 99_857, 2**17])
def test_larger_sizes_are_permuted(n):
    assert np.array_equal(np.sort(images(n, 3, 1)), np.arange(n))


@given(st.integers(1, 3000), KEYS)
def test_any_key_permutes(n, key):
    assert np.array_equal(np.sort(images(n, *key)), np.arange(n))


@given(st.integers(1, 2**62), KEYS, st.data())
def test_a_position_does_not_care_which_others_are_asked_for(n, key, data):
    positions = np.asarray(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)), dtype=np.int64)
    together = permute(positions, n, *key)
    assert [int(permute(position[None], n, *key)[0]) for position in positions] == together.tolist()
    assert together.min() >= 0
    assert together.max() < n
    assert len(set(together.tolist())) == len(set(positions.tolist()))


def test_any_shape_comes_back_and_the_positions_stay_as_they_were():
    positions = np.arange(24)[::-1].reshape(2, 3, 4)
    assert permute(positions, 24, 5).shape == (2, 3, 4)
    assert np.array_equal(positions, np.arange(24)[::-1].reshape(2, 3, 4))
    assert permute(np.zeros(0, dtype=np.int64), 24, 5).shape == (0,)


def test_positions_outside_and_keys_that_do_not_fit_are_refused():
    for positions, n, key in [([5], 5, ()), ([-1], 5, ()), ([0], 0, ()), ([0], 5, (-1,)), ([0], 5, (2**64,))]:
        with pytest.raises(AssertionError):
            permute(np.asarray(positions), n, *key)


def in_deviations(observed, cells, freedom):
    """Chi-square of counts against equal shares, in standard deviations above what chance gives."""
    expected = observed.sum() / cells
    statistic = ((observed - expected) ** 2 / expected).sum() * freedom / (cells - 1)
    return (statistic - freedom) / np.sqrt(2 * freedom)


# Six standard deviations: with these 10 fixed draws, a uniform order would fail about once in ten million repetitions of
# the whole test (the chi-square's longer right tail included), while two rounds instead of twelve miss it by hundreds.
@pytest.mark.parametrize("n", [4, 5, 7, 8, 13])
def test_positions_and_adjacent_pairs_are_uniform(n):
    keys = 2000
    drawn = np.stack([images(n, Purpose.TRAINING, 42, epoch) for epoch in range(keys)])
    positions = np.zeros((n, n))
    np.add.at(positions, (np.broadcast_to(np.arange(n), drawn.shape), drawn), 1)
    assert in_deviations(positions, n * n, (n - 1) ** 2) < 6
    pairs = np.zeros((n, n))
    np.add.at(pairs, (drawn[:, :-1], drawn[:, 1:]), 1)
    assert pairs.trace() == 0
    assert in_deviations(pairs[~np.eye(n, dtype=bool)], n * (n - 1), n * (n - 1) - 1) < 6


def test_far_positions_of_a_large_set_are_uniform():
    # The last 16,000 of 10^6 positions into 100 equal bins; six deviations, as above.
    n = 10**6
    rows = permute(np.arange(n - 16_000, n), n, 9)
    assert abs(in_deviations(np.bincount(rows * 100 // n, minlength=100), 100, 99)) < 6


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, 42, 0), (1, 42, 1)),
        ((1, 42, 0), (1, 43, 0)),
        ((1, 42, 0), (2, 42, 0)),
        ((1, 42, 0), (1, 0, 42)),
        ((1, 42), (1, 42, 0)),
        ((1, 2**63, 0), (1, 0, 0)),
    ],
)
def test_another_key_gives_an_unrelated_order(one, other):
    # Coinciding rows are Poisson(1): more than 12 come once in 10^10. A rank correlation of n rows deviates by 1/sqrt(n).
    n = 20_000
    a, b = images(n, *one), images(n, *other)
    assert (a == b).sum() <= 12
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)
    assert abs(np.corrcoef(a[:-1], b[1:])[0, 1]) < 5 / np.sqrt(n)


def test_a_million_million_rows_cost_what_the_batch_costs():
    n = 10**12
    step = steps_per_epoch(n, 64) * 3 + 7_000_000_000
    global_batch(0, seed=1, num_examples=n, global_batch_size=64)
    tracemalloc.start()
    began = time.perf_counter()
    rows = global_batch(step, seed=1, num_examples=n, global_batch_size=64)
    seconds, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(rows.tolist())) == 64
    assert rows.max() > n / 2  # all of 64 rows in one half: once in 10^19
    assert peak < 200_000  # bytes: some arrays of 64 words
    assert seconds < 1  # measured: a millisecond; the margin is for busy machines


@given(st.integers(1, 400), st.integers(1, 130), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_the_batches_of_an_epoch_take_each_row_once(n, size, seed, epoch):
    steps = steps_per_epoch(n, size)
    batches = [global_batch(epoch * steps + k, seed=seed, num_examples=n, global_batch_size=size) for k in range(steps)]
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    assert [len(batch) for batch in batches[:-1]] == [size] * (steps - 1)
    assert len(batches[-1]) == n - size * (steps - 1)
    assert 0 < len(batches[-1]) <= size


def test_epochs_and_seeds_differ_and_the_batch_size_does_not_matter():
    def epoch(number, seed, size=50):
        return [
            row
            for k in range(1000 // size)
            for row in global_batch(number * (1000 // size) + k, seed=seed, num_examples=1000, global_batch_size=size)
        ]

    assert epoch(0, seed=1) != epoch(1, seed=1)
    assert epoch(0, seed=1) != epoch(0, seed=2)
    assert epoch(2, seed=1, size=50) == epoch(2, seed=1, size=8)


@given(st.integers(0, 500), st.integers(0, 2**63 - 1))
def test_shuffled_holds_every_row(n, seed):
    assert sorted(shuffled(n, seed).tolist()) == list(range(n))


@given(st.integers(0, 300), st.integers(0, 400), st.integers(0, 2**63 - 1))
def test_a_subset_has_its_size_in_ascending_order(n, size, seed):
    rows = subset(n, size, seed)
    assert len(rows) == min(n, size)
    assert (np.diff(rows) > 0).all()
    assert np.isin(rows, np.arange(n)).all()


def test_a_subset_is_drawn_from_everywhere_and_grows_by_adding():
    # 2,000 of 10^5 rows: each quarter gets 500, give or take 19; 100 are five deviations.
    assert (abs(np.bincount(subset(100_000, 2000, 42) // 25_000, minlength=4) - 500) < 100).all()
    assert set(subset(1000, 50, 42)) < set(subset(1000, 80, 42))
    assert set(subset(1000, 50, 42)) != set(subset(1000, 50, 43))


LABELS = st.lists(st.integers(-1, 6), max_size=200)


@given(LABELS, st.integers(0, 2**63 - 1))
def test_every_window_of_stratified_holds_the_classes_in_proportion(labels, seed):
    labels = np.asarray(labels, dtype=np.int64)
    rows = stratified(labels, seed)
    assert sorted(rows.tolist()) == list(range(len(labels)))
    classes = np.unique(labels)
    for label in classes:
        share = float((labels == label).mean())
        excess = np.concatenate([[0.0], np.cumsum((labels[rows] == label) - share)])
        # A class alone is within half a row of its share of the way; the others' half rows count by its share.
        # Any window is the difference of two prefixes: one row for two classes, two for classes of equal size.
        assert excess.max() - excess.min() <= 1 + share * max(0, len(classes) - 2) + 1e-9


@pytest.mark.parametrize("seed", [0, 42])
def test_cuts_of_stratified_are_disjoint_and_alike(seed):
    labels = np.repeat([0, 1, 2], [600, 300, 100])  # sorted by label, as some public files are
    rows = stratified(labels, seed)
    train, validation, test = rows[:800], rows[800:900], rows[900:]
    assert len({*train, *validation, *test}) == 1000
    for part, counts in [(train, [480, 240, 80]), (validation, [60, 30, 10]), (test, [60, 30, 10])]:
        assert (abs(np.bincount(labels[part], minlength=3) - counts) <= 1).all()


def test_stratified_draws_by_seed_and_not_by_place():
    labels = np.arange(1000) % 2
    one, other = (set(stratified(labels, seed)[:100].tolist()) for seed in (1, 2))
    assert len(one & other) < 30  # 10 by chance, give or take 3
    halves = np.asarray(sorted(one)) // 500
    assert 30 < halves.sum() < 70  # 50 by chance, give or take 5
    # Classes are drawn apart: the same places in two classes of one size would repeat one pattern.
    blocks = np.repeat([0, 1], 500)
    drawn = stratified(blocks, 1)
    assert (drawn[blocks[drawn] == 0] == drawn[blocks[drawn] == 1] - 500).sum() <= 12  # Poisson(1), as above


def test_the_order_is_the_one_that_recorded_results_were_made_with():
    """Whoever changes these numbers changes what every recipe means: raise the version, and run the recipes again."""
    assert images(10, Purpose.TRAINING, 42, 0).tolist() == GOLDEN["images"]
    assert global_batch(0, seed=42, num_examples=100_000, global_batch_size=4).tolist() == GOLDEN["first"]
    assert global_batch(12_345, seed=7, num_examples=10**12, global_batch_size=4).tolist() == GOLDEN["huge"]
    assert shuffled(8, 42).tolist() == GOLDEN["shuffled"]
    assert subset(100, 5, 42).tolist() == GOLDEN["subset"]
    assert stratified(np.asarray([0, 0, 0, 0, 0, 0, 1, 1, 1]), 42).tolist() == GOLDEN["stratified"]
    assert order.ROUNDS == 12


GOLDEN = {
    "images": [1, 7, 6, 3, 0, 9, 8, 2, 4, 5],
    "first": [92860, 96700, 59733, 53720],
    "huge": [689177589093, 898383635539, 660401788713, 944726888625],
    "shuffled": [5, 4, 2, 1, 7, 3, 6, 0],
    "subset": [1, 4, 19, 39, 92],
    "stratified": [2, 6, 1, 3, 7, 4, 0, 8, 5],
}

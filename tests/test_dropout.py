"""Masks look like coin flips from every side, and belong to seed, step, example, site and place, and to nothing else."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from harness import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from keyed import (
    DISENTANGLED,
    MODULE,
    MORE,
    ROWS,
    Mask,
    batch,
    build,
    dropped,
    gradients,
    keys_of,
    same,
    step_of,
    strays_of,
    words,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from accel_trainer.classifier import Classifier
from accel_trainer.dropout import LEVELS, ForwardPass, KeyedDropout, Site, _shifted, drop, example_keys, install
from accel_trainer.errors import UserError

Numbers = npt.NDArray[np.float64]
# ------------------------------------------------------------------------------------------------------------------------
# What chance allows. Each assertion below fails for a mask of fair coins at most once in 10^5 repetitions, with all that it
# compares, and there are some three hundred: of some three hundred fair hashes one may fail. The masks are fixed, so that
# what passes once passes always.


def most(count: int) -> float:
    """The largest of `count` deviations, each of which exceeds x with a chance of at most 2·exp(-x²/2).

    That is so for the sum of n independent signs ÷ √n (Hoeffding), and for `deviations` (Chernoff), at any n and
    however the `count` depend on each other. A single one is 4.9, close to five standard deviations; a million are 7.2.
    """
    return math.sqrt(2 * math.log(2 * count / 1e-5))


def deviations(heads: npt.NDArray[Any], n: int, p: float) -> Numbers:
    """How far numbers of heads in n flips lie from n·p, nearly in standard deviations: √(2n·KL(heads/n ‖ p))."""
    share = np.asarray(heads, dtype=np.float64) / n
    with np.errstate(divide="ignore", invalid="ignore"):
        here = np.where(share > 0, share * np.log(share / p), 0)
        there = np.where(share < 1, (1 - share) * np.log((1 - share) / (1 - p)), 0)
    return np.asarray(np.sqrt(2 * n * np.maximum(here + there, 0)))


def assert_chi_square(statistic: float, freedom: int, count: int = 1) -> None:
    """A chi-square is neither too large nor too small, as one of `count`: the bounds of Laurent and Massart (2000)."""
    x = math.log(2 * count / 1e-5)
    assert freedom - 2 * math.sqrt(freedom * x) < statistic < freedom + 2 * math.sqrt(freedom * x) + 2 * x


def chi_square_of(counts: npt.NDArray[Any], chances: Numbers | float) -> float:
    """Of counts in cells of known chances; near a chi-square where each cell expects some dozens."""
    expected = counts.sum() * np.broadcast_to(chances, counts.shape)
    assert expected.min() > 30
    return float(((counts - expected) ** 2 / expected).sum())


def rate(p: float) -> float:
    """What p is rounded to."""
    return round(p * 65536) / 65536


def assert_unrelated(masks: Mask, p: float) -> None:
    """No two of the masks (masks, values) know of each other: all pairs' 2×2 tables are those of independent coins."""
    p, (count, n) = rate(p), masks.shape
    pairs = np.triu_indices(count, 1)
    drops = masks.astype(np.float32)  # counts below 2²⁴ are exact
    heads = drops.sum(1).astype(np.float64)
    both = (drops @ drops.T).astype(np.float64)[pairs]
    one, other = heads[pairs[0]] - both, heads[pairs[1]] - both
    # The four cells; and how many are alike, which is the correlation of coins with p = ½.
    cells = [(both, p * p), (one, p * (1 - p)), (other, p * (1 - p)), (n - both - one - other, (1 - p) ** 2)]
    for observed, chance in (*cells, (n - one - other, p * p + (1 - p) ** 2)):
        assert deviations(observed, n, chance).max() < most(5 * len(both))
    # The correlation: a normal deviate ÷ √n, since products of so many values are summed (skewness below 0.05).
    correlation = (both / n - p * (heads[pairs[0]] + heads[pairs[1]]) / n + p * p) / (p * (1 - p))
    assert abs(correlation).max() < most(len(both)) / math.sqrt(n)
    # Pearson's chi-square of each table, with 3 degrees of freedom and Laurent and Massart's bound.
    table = sum((observed - n * chance) ** 2 / (n * chance) for observed, chance in cells)
    x = math.log(len(both) / 1e-5)
    assert np.max(table) < 3 + 2 * math.sqrt(3 * x) + 2 * x
    # All pairs together, for what is too small to be seen in one: as many squared deviates, uncorrelated.
    assert_chi_square(float((correlation**2).sum() * n), len(both))


# ------------------------------------------------------------------------------------------------------------------------
# How many are dropped


@pytest.mark.parametrize("p", [0.01, 0.1, 0.3, 0.5, 0.9])
def test_the_rate_is_p_overall_and_in_every_cut(p: float) -> None:
    """In every feature, position, example, site and step, and in all combinations of these that leave enough values."""
    modules = ["bert.embeddings.dropout", MODULE]
    parts = [[dropped((32, 256), p, range(100, 116), step=s, module=m) for m in modules] for s in range(4)]
    drops = np.asarray(parts)  # step, site, example, position, feature
    counted: dict[tuple[int, ...], npt.NDArray[np.int64]] = {}
    for size in range(drops.ndim):
        for axes in itertools.combinations(range(drops.ndim), size):
            others = tuple(axis for axis in range(drops.ndim) if axis not in axes)
            heads = counted[axes] = np.asarray(drops.sum(others))
            n = drops.size // heads.size
            assert deviations(heads, n, rate(p)).max() < most(heads.size * 31)
            if heads.size > 1 and n * rate(p) * (1 - rate(p)) > 40:  # neither too unequal nor too equal
                statistic = ((heads - n * rate(p)) ** 2).sum() / (n * rate(p) * (1 - rate(p)))
                assert_chi_square(float(statistic), heads.size, 31)
    assert len(counted) == 31


@pytest.mark.parametrize("level", [1, 2, 655, 6554, 32768, 65534, 65535])
def test_the_probability_is_a_65536th_to_the_last(level: int) -> None:
    """One level more or less would show: with level 1, 64 of 2²² values are dropped, give or take 8, and not 0 or 128."""
    n, heads = 0, 0
    for step in range(4):
        drops = dropped((256, 512), level / LEVELS, step=step)
        n, heads = n + drops.size, heads + int(drops.sum())
    assert n == 2**22
    assert deviations(np.asarray(heads), n, level / LEVELS) < most(1)


@given(st.floats(0, 1), st.integers(0, 2**63 - 1))
def test_p_is_rounded_and_what_is_kept_is_scaled_by_the_rounded_rate(p: float, seed: int) -> None:
    level = round(p * 65536)
    keys = keys_of(range(3), seed=seed)
    x = torch.randn(3, 4, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(seed % 2**32))
    y = drop(x, p, keys)
    assert torch.equal(y, drop(x, level / 65536, keys))
    if level == 65536:
        assert not y.any()
        return
    scale = 65536 / (65536 - level)
    assert bool(((y == 0) | (y == x * scale)).all())
    # The expectation is exactly x: chance of keeping times scale.
    assert (65536 - level) * scale == pytest.approx(65536, rel=1e-15)


@given(st.floats(0, 1), st.floats(0, 1))
def test_with_a_larger_probability_more_is_dropped_and_nothing_else_kept(p: float, q: float) -> None:
    low, high = (dropped((5, 21), probability) for probability in sorted((p, q)))
    assert (low <= high).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [1e-4, 0.1, 1 / 3, 0.5, 0.9])
def test_values_are_scaled_or_zero_and_the_mask_is_the_same_in_every_type(dtype: torch.dtype, p: float) -> None:
    x = torch.randn(8, 16, 65, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    keys = keys_of(range(8))
    y = drop(x, p, keys)
    mask = torch.from_numpy(dropped((16, 65), p))
    scale = 65536 / (65536 - round(65536 * p))
    assert y.dtype == dtype
    assert torch.equal(y, torch.where(mask, torch.zeros((), dtype=dtype), x * scale))
    # The gradient: mask times scale.
    above = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(above)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(mask, torch.zeros((), dtype=dtype), above * scale))


def test_nothing_is_dropped_at_0_and_everything_at_1() -> None:
    x = torch.randn(4, 5, 6, requires_grad=True)
    assert drop(x, 0.0, keys_of(range(4))) is x
    assert drop(x, 0.4 / 65536, keys_of(range(4))) is x  # rounds to 0
    y = drop(x, 1.0, keys_of(range(4)))
    assert not y.any()
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None
    assert not x.grad.any()
    module = KeyedDropout(0.0, Site(ForwardPass(), "d"))
    assert module(x) is x  # without keys even
    assert KeyedDropout(0.5, Site(ForwardPass(), "d")).eval()(x) is x


# ------------------------------------------------------------------------------------------------------------------------
# Independence


def along(axis: int, drops: Mask) -> Mask:
    """The masks at each index of one axis, flat: (size of the axis, everything else)."""
    return np.moveaxis(drops, axis, 0).reshape(drops.shape[axis], -1)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_features_positions_and_examples_are_unrelated(p: float) -> None:
    """All pairs of features (of one word, of neighbouring words, at distance 2^k, …), of positions and of examples."""
    assert_unrelated(along(2, dropped((1024, 256), p, range(32))), p)
    assert_unrelated(along(1, dropped((128, 1024), p, range(32))), p)
    near_and_far = [7, 8, 9, *(7 ^ (1 << k) for k in range(62)), *(7 + (1 << k) for k in range(3, 62))]
    assert_unrelated(along(0, dropped((64, 512), p, sorted(set(near_and_far)))), p)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_heads_queries_and_keys_of_attention_are_unrelated(p: float) -> None:
    module = "bert.encoder.layer.0.attention.self"
    assert_unrelated(along(1, dropped((24, 64, 64), p, module=module)), p)
    drops = dropped((8, 128, 128), p, range(32), module=module)
    assert_unrelated(along(2, drops), p)
    assert_unrelated(along(3, drops), p)
    # Nor does a pair of tokens see itself the other way round, or head and query change places.
    above = np.triu_indices(128, 1)
    assert_unrelated(np.stack([drops[:, :, *above].ravel(), drops.swapaxes(2, 3)[:, :, *above].ravel()]), p)
    square = drops[:, :, :8]
    heads, queries = np.triu_indices(8, 1)
    assert_unrelated(np.stack([square[:, heads, queries].ravel(), square[:, queries, heads].ravel()]), p)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("coordinate", ["step", "seed"])
def test_steps_and_seeds_are_unrelated(coordinate: str, p: float) -> None:
    values = sorted({1000, 1001, 1002, 0, *(1000 ^ (1 << k) for k in range(63)), *(1000 + (1 << k) for k in range(40))})
    masks = [dropped((8, 512), p, **{coordinate: value}).ravel() for value in values]
    assert_unrelated(np.stack(masks), p)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_sites_and_calls_are_unrelated(p: float) -> None:
    parts = ("attention.self", "attention.output.dropout", "output.dropout")
    modules = ["bert.embeddings.dropout", "dropout"]
    modules += [f"bert.encoder.layer.{layer}.{part}" for layer in range(24) for part in parts]
    assert_unrelated(np.stack([dropped((8, 512), p, module=module).ravel() for module in modules]), p)
    assert_unrelated(np.stack([dropped((8, 512), p, call=call).ravel() for call in range(48)]), p)


def test_what_belongs_to_no_example_has_a_mask_of_its_step() -> None:
    """The same whatever the micro-batch, another in each step and seed, and unrelated to the examples' own."""

    def of_step(rows: Sequence[int] = (3, 1, 4), **key: int) -> Mask:
        forward_pass = ForwardPass(shared=frozenset([MODULE]))
        forward_pass.begin(example_keys(np.asarray(rows), **{"seed": 42, "step": 1000, **key}))
        return drop(torch.ones(64, 512), 0.5, forward_pass.at(Site(forward_pass, MODULE))).numpy() == 0

    assert np.array_equal(of_step(), of_step([9]))
    masks = [of_step(), *(of_step(step=step) for step in range(16)), *(of_step(seed=seed) for seed in range(16))]
    masks += [dropped((64, 512), 0.5, [row])[0] for row in range(16)]
    assert_unrelated(np.stack([mask.ravel() for mask in masks]), 0.5)


def test_coordinates_do_not_stand_for_each_other() -> None:
    """One step on and one example back is not the same as before: neighbours in several coordinates are unrelated."""
    near = [
        dropped((64, 512), 0.5, [100 + row], seed=100 + seed, step=100 + step, call=call).ravel()
        for row, seed, step, call in itertools.product(range(3), repeat=4)
    ]
    assert_unrelated(np.stack(near), 0.5)


def bundle_of_rows(p: float) -> Mask:
    """96 rows of 512 features that have much in common: neighbours in position, example, step, call and head."""
    rows = [
        dropped((16, 512), p, [5])[0],
        dropped((1, 512), p, range(6, 22))[:, 0],
        dropped((512,), p, [5, 6, 7, 8]),
        *(dropped((1, 512), p, [5], step=1001 + k)[0] for k in range(14)),
        *(dropped((1, 512), p, [5], seed=43 + k)[0] for k in range(14)),
        *(dropped((1, 512), p, [5], call=1 + k)[0] for k in range(14)),
        dropped((3, 6, 512), p, [5])[0].reshape(18, 512),
    ]
    bundle = np.concatenate(rows)
    assert bundle.shape == (96, 512)
    return bundle


def test_no_row_is_a_shifted_mirrored_or_permuted_copy_of_another() -> None:
    """Signs of any two rows, of a row and itself too, agree in half of the places at every offset.

    Products of two rows' signs at any one offset are independent signs, along a row and itself as well. A copy that
    overlaps in 64 places or more would stand out: its deviation is √64 = 8, above the bound of 7.7.
    """
    signs = 1.0 - 2 * bundle_of_rows(0.5)
    count, features = signs.shape
    first, second = np.triu_indices(count)
    same = first == second
    transformed = np.fft.rfft(signs, 2 * features)
    offset = np.arange(2 * features)
    # Shifted: places f of one beside f + s of the other, s from -511 to 511.
    overlap = np.maximum(features - np.minimum(offset, 2 * features - offset), 1)
    shifted = np.fft.irfft(transformed[first] * transformed[second].conj()) / np.sqrt(overlap)
    shifted[same, 0] = 0
    # Mirrored: place f of one beside place s - f of the other, s from 0 to 1022.
    overlap = features - abs(offset[:-1] - (features - 1))
    mirrored = np.fft.irfft(transformed[first] * transformed[second])[~same, :-1] / np.sqrt(overlap)
    # Permuted: place f of one beside place f XOR s of the other, for the hash combines by XOR.
    places = np.arange(features)
    hadamard = 1.0 - 2 * (np.bitwise_count(places[:, None] & places) % 2)
    walsh = signs @ hadamard
    permuted = (walsh[first] * walsh[second]) @ hadamard / features / math.sqrt(features)
    permuted[same] /= math.sqrt(2)  # each product counts twice
    permuted[same, 0] = 0
    compared = shifted.size + mirrored.size + permuted.size
    assert max(abs(part).max() for part in (shifted, mirrored, permuted)) < most(compared) < 7.7


def test_no_stretch_of_a_row_comes_again_anywhere() -> None:
    """No two of 7 million windows of 64 neighbours are equal, at whatever places; coins' would once in 700,000 masks.

    A hash of the sum of key and feature would repeat a row of 512 features, shifted, in one of ten million pairs of rows:
    too rare for the comparison of pairs above, and often in a batch of 16,384 tokens.
    """
    drops = dropped((512, 512), 0.5, range(32))
    for sequences in (drops.reshape(-1, 512), drops.swapaxes(1, 2).reshape(-1, 512)):
        windows = sequences.astype(np.uint64)
        for width in (1, 2, 4, 8, 16, 32):  # the bits of two neighbouring windows make one of twice the width
            windows = windows[:, :-width] << np.uint64(width) | windows[:, width:]
        assert windows.shape == (2**14, 512 - 63)
        ordered = np.sort(windows, axis=None)
        assert (ordered[1:] != ordered[:-1]).all()


# ------------------------------------------------------------------------------------------------------------------------
# Sequences and numbers


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_gaps_between_dropped_features_are_geometric(p: float) -> None:
    drops = dropped((64, 1024), p, range(16))
    q = 1 - rate(p)
    # Places between one drop and the next, in all rows end to end.
    gaps = np.diff(np.flatnonzero(drops)) - 1
    longest = int(math.log(40 / len(gaps) / (1 - q)) / math.log(q))  # the last that 40 are expected of
    counts = np.bincount(np.minimum(gaps, longest), minlength=longest + 1)
    chances = np.append((1 - q) * q ** np.arange(longest), q**longest)
    assert_chi_square(chi_square_of(counts, chances), longest)
    assert gaps.max() < math.log(1e-5 / len(gaps)) / math.log(q)
    # In each row: the places where kept and dropped change.
    changes = (drops[..., :-1] != drops[..., 1:]).sum(-1)
    if p == 0.5:  # where they are independent
        assert deviations(changes, 1023, 0.5).max() < most(changes.size)
        assert_chi_square(float(((changes - 511.5) ** 2).sum() / (1023 / 4)), changes.size)
    runs = np.diff(np.flatnonzero(np.diff(drops.ravel().astype(np.int8))))
    assert runs.max() < math.log(1e-5 / drops.size) / math.log(max(q, 1 - q)) + 1


def test_patterns_of_eight_neighbours_are_uniform() -> None:
    """All 256 patterns of eight neighbouring features, positions, and heads by queries, keys, steps."""
    drops = dropped((64, 1024), 0.5, range(16))
    patterns = [drops.reshape(-1, 8), drops.swapaxes(1, 2).reshape(-1, 8), drops.transpose(1, 2, 0).reshape(-1, 8)]
    attention = dropped((2, 64, 64), 0.5, range(32)).reshape(32, 2, 32, 2, 32, 2)
    patterns.append(attention.transpose(0, 2, 4, 1, 3, 5).reshape(-1, 8))
    steps = np.stack([dropped((64, 128), 0.5, step=step) for step in range(8)], axis=-1)
    patterns.append(steps.reshape(-1, 8))
    for pattern in patterns:
        counts = np.bincount(np.packbits(pattern, axis=-1).ravel(), minlength=256)
        assert_chi_square(chi_square_of(counts, 1 / 256), 255, len(patterns))


def test_the_16_bits_behind_a_value_are_uniform() -> None:
    """Thresholds at every 256th tell the upper 8 of the 16 bits; both halves of a word, and pairs of them."""
    shape, rows = (64, 512), range(8)
    keys = keys_of(rows)
    ones = torch.ones(len(rows), *shape)
    bins = torch.zeros(ones.shape, dtype=torch.int16)
    for level in range(1, 256):
        bins += drop(ones, level / 256, keys) != 0
    values = 255 - bins.numpy()  # 255 if only the highest threshold drops it
    low, high = values[..., ::2], values[..., 1::2]
    for half in (low, high):
        assert_chi_square(chi_square_of(np.bincount(half.ravel(), minlength=256), 1 / 256), 255, 2)
    neighbours = {
        "the halves of a word": (low, high),
        "one word and the next": (values[..., :-2], values[..., 2:]),
        "a word's half and the next word's other half": (high[..., :-1], low[..., 1:]),
        "one position and the next": (values[:, :-1], values[:, 1:]),
        "one example and the next": (values[:-1], values[1:]),
    }
    for one, other in neighbours.values():
        joint = np.bincount((one // 16 * 16 + other // 16).ravel(), minlength=256)
        assert_chi_square(chi_square_of(joint, 1 / 256), 255, len(neighbours))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_spectrum_of_a_mask_is_that_of_noise(p: float) -> None:
    """All singular values of tokens × features, centred, lie between the edges of Marchenko and Pastur.

    The largest squared one, by Johnstone (2001): mean (√(n-1) + √m)² and deviation (√(n-1) + √m)·(1/√(n-1) + 1/√m)^⅓,
    Tracy and Widom's law, which exceeds 6 about once in 10^5. The smallest, mirrored, is as sure to stay above -9.
    """
    n, m = 2048, 512
    drops = dropped((256, m), p).reshape(n, m)
    centred = (drops - rate(p)) / math.sqrt(rate(p) * (1 - rate(p)))
    squares = np.linalg.eigvalsh(centred.T @ centred)
    one, other = math.sqrt(n - 1), math.sqrt(m)
    assert -9 < (squares[-1] - (one + other) ** 2) / ((one + other) * (1 / one + 1 / other) ** (1 / 3)) < 6
    assert -9 < ((one - other) ** 2 - squares[0]) / ((one - other) * (1 / other - 1 / one) ** (1 / 3)) < 6


def rank_over_two(rows: Mask) -> int:
    """Rank of a matrix of bits over the field of two elements."""
    pivots: dict[int, int] = {}
    for row in (int.from_bytes(np.packbits(row).tobytes(), "big") for row in rows):
        while row and row.bit_length() in pivots:
            row ^= pivots[row.bit_length()]
        if row:
            pivots[row.bit_length()] = row
    return len(pivots)


def test_bits_are_not_linear_in_one_another() -> None:
    """Over two elements, 512 × 512 random bits lack 5 of their rank or more once in 10^7; shifts and XORs alone lack 480."""
    drops = dropped((512, 1024), 0.5, [3])[0]
    both = dropped((512,), 0.5, range(512))
    for square in (drops[:, :512], drops[:, ::2], drops[:, 1::2], both):
        assert rank_over_two(square) > 512 - 5
    assert rank_over_two(np.eye(40, dtype=bool)[:30]) == 30


def test_the_masks_are_those_that_recorded_results_were_made_with() -> None:
    """Whoever changes these numbers changes what a seed means: raise the version, and run the recipes again."""
    assert example_keys(np.asarray([0, 10**6]), seed=42, step=7).tolist() == RECORDED["keys"]
    assert [[int(word) for word in words] for words in keys_of([0, 10**6])] == RECORDED["site"]
    assert [[int(word) for word in words] for words in keys_of([0], call=3, module="a")] == RECORDED["call"]
    for name, shape in (("2-D", (61,)), ("3-D", (3, 21)), ("4-D", (2, 3, 10))):
        bits = dropped(shape, 0.3, [5], seed=1, step=2)
        assert np.packbits(bits).tobytes().hex() == RECORDED[name]


RECORDED: dict[str, Any] = {
    "keys": [
        [2134327186, -1666788346, 685691494, 1023730966],
        [1847721465, -1971621093, 685691494, 1023730966],
    ],
    "site": [[725260971, 40683667], [157760819, -1615310388]],
    "call": [[-976855746], [-903082369]],
    "2-D": "84829351a081c458",
    "3-D": "1c01a04c173f640c",
    "4-D": "080087ed8b3606b0",
}


# ------------------------------------------------------------------------------------------------------------------------
# What a mask depends on


@given(st.data())
def test_the_mask_does_not_depend_on_how_far_an_axis_extends_nor_on_the_company(data: st.DataObject) -> None:
    """A part of the examples, in another order, and less of every axis: a part of the mask, in that order."""
    inner = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    rows = data.draw(st.lists(st.integers(0, 2**62), min_size=1, max_size=6, unique=True))
    p = data.draw(st.sampled_from([0.05, 0.3, 0.5, 0.8]))
    whole = dropped(tuple(inner), p, rows)
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    shorter = tuple(data.draw(st.integers(1, size)) for size in inner)
    part = dropped(shorter, p, [rows[i] for i in chosen])
    assert np.array_equal(part, whole[chosen][:, *(slice(size) for size in shorter)])


@given(st.lists(st.integers(1, 7), min_size=2, max_size=3), st.integers(1, 4), st.integers(2, 4))
def test_examples_may_be_folded_with_their_heads(inner: list[int], examples: int, heads: int) -> None:
    x = torch.ones(examples, heads, *inner)
    keys = keys_of(range(examples))
    assert torch.equal(drop(x.flatten(0, 1), 0.5, keys), drop(x, 0.5, keys).flatten(0, 1))


def test_axes_that_are_not_examples_are_refused() -> None:
    with pytest.raises(UserError, match=r"dropout of \(9, 2, 4\) values for 2 examples"):
        drop(torch.ones(9, 2, 4), 0.5, keys_of(range(2)))


def test_keys_and_input_stay_as_they_were_and_memory_layout_does_not_matter() -> None:
    keys, x = keys_of(range(4)), torch.randn(4, 6, 10)
    before = [part.clone() for part in (*keys, x)]
    y = drop(x, 0.3, keys)
    assert all(torch.equal(part, kept) for part, kept in zip((*keys, x), before, strict=True))
    assert torch.equal(y, drop(x, 0.3, keys))
    strided = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    assert torch.equal(y, drop(strided, 0.3, keys))
    wider = torch.stack([torch.zeros(4, dtype=torch.int32), *keys], -1)
    assert torch.equal(y, drop(x, 0.3, (wider[:, 1], wider[:, 2])))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_mask_is_the_same_on_a_gpu() -> None:
    x = torch.ones(4, 33, 129)
    keys = keys_of(range(4))
    there = drop(x.cuda(), 0.3, tuple(key.cuda() for key in keys))  # type: ignore[arg-type]
    assert torch.equal(there.cpu(), drop(x, 0.3, keys))


def test_torch_seed_and_random_stream_are_not_touched() -> None:
    torch.manual_seed(1)
    first = dropped((7, 8), 0.5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert np.array_equal(first, dropped((7, 8), 0.5))
    assert torch.equal(before, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------------------------------
# Sites


def installed(net: nn.Module) -> ForwardPass:
    """The forward pass of a net whose dropouts are replaced."""
    forward_pass = ForwardPass()
    install(net, forward_pass)  # type: ignore[arg-type]
    return forward_pass


class Shared(nn.Module):
    """One dropout object in three places of two modules, called in each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Dropout(0.5)
        self.inner = nn.Module()
        self.inner.drop = self.first
        self.listed = nn.ModuleList([nn.ModuleDict({"a": nn.Sequential(self.first)})])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [module(x) for module in (self.first, self.inner.drop, self.listed[0]["a"])]  # type: ignore[index, operator]


def test_each_call_of_a_module_is_a_site_and_the_next_forward_pass_has_the_same() -> None:
    net, ones = Shared(), torch.ones(3, 40)
    forward_pass = installed(net)
    assert not [m for m in net.modules() if isinstance(m, nn.Dropout) and not isinstance(m, KeyedDropout)]
    forward_pass.begin(words())
    once = net(ones)
    assert len({tuple(mask.flatten().tolist()) for mask in once}) == 3
    for call, mask in enumerate(once):
        assert np.array_equal(mask == 0, dropped((40,), 0.5, [3, 1, 4], step=0, module="first", call=call))
    forward_pass.end()
    forward_pass.begin(words())
    assert all(torch.equal(a, b) for a, b in zip(once, net(ones), strict=True))
    forward_pass.begin(words(step=1))
    assert not any(torch.equal(a, b) for a, b in zip(once, net(ones), strict=True))


def test_a_forward_pass_that_failed_leaves_nothing_behind() -> None:
    net, ones = Shared(), torch.ones(3, 40)
    forward_pass = installed(net)
    forward_pass.begin(words())
    once = net(ones)
    forward_pass.begin(words())
    net.first(ones)  # and never ended
    forward_pass.begin(words())
    assert all(torch.equal(a, b) for a, b in zip(once, net(ones), strict=True))


def test_a_dropout_with_two_names_in_one_module_is_reached_under_both() -> None:
    net = nn.Module()
    net.one = net.two = nn.Dropout(0.5)
    installed(net)
    assert isinstance(net.one, KeyedDropout)
    assert isinstance(net.two, KeyedDropout)


def test_probability_and_mode_are_kept_and_installing_again_changes_nothing() -> None:
    net = nn.Module()
    net.d = nn.Dropout(0.3)
    net.e = nn.Sequential(nn.Dropout(0.7)).eval()
    forward_pass = installed(net)
    assert net.d.p == 0.3
    assert net.e[0].p == 0.7
    ones = torch.ones(3, 40)
    forward_pass.begin(words())
    once = net.train().d(ones)
    again = installed(net)
    again.begin(words())
    assert torch.equal(once, net.train().d(ones))
    assert not net.eval().d(ones).eq(0).any()


def test_training_without_keys_is_a_mistake_of_ours() -> None:
    net = Shared()
    forward_pass = installed(net)
    with pytest.raises(AssertionError, match="needs the keys"):
        net.train()(torch.ones(3, 4))
    forward_pass.begin(words())
    net(torch.ones(3, 4))
    forward_pass.begin(None)
    with pytest.raises(AssertionError, match="needs the keys"):
        net(torch.ones(3, 4))


class Layered(nn.Module):
    """Two layers with dropout, each computed again in the backward pass if asked; the second may be the first again."""

    def __init__(self, *, recompute: bool, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.2)) for _ in range(2)]
        self.layers = nn.ModuleList([layers[0], layers[0]] if shared else layers)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return x


def test_recomputed_layers_drop_what_they_dropped() -> None:
    found = []
    for recompute in (False, True):
        net = Layered(recompute=recompute)
        forward_pass = installed(net)
        for step in range(3):  # micro-batches: a replay must not count as a call of the next
            forward_pass.begin(words(step))
            y = net(torch.arange(24.0).reshape(3, 8) / 24)
            forward_pass.end()
            y.square().sum().backward()
        found.append(gradients(net))
    assert same(*found)


def test_a_shared_layer_cannot_be_recomputed_and_says_so() -> None:
    net = Layered(recompute=True, shared=True)
    forward_pass = installed(net)
    forward_pass.begin(words())
    y = net(torch.ones(3, 8))
    forward_pass.end()
    with pytest.raises(
        UserError, match=r"layers\.0\.\d is used 2 times .* without gradient \(or activation\) checkpointing"
    ):
        y.sum().backward()
    plain = Layered(recompute=False, shared=True)
    forward_pass = installed(plain)
    forward_pass.begin(words())
    y = plain(torch.ones(3, 8))
    forward_pass.end()
    y.sum().backward()


# ------------------------------------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_a_padded_micro_batch_is_its_examples_one_by_one(family: str) -> None:
    """Logits and gradients, with dropout in hidden states and in attention, however the examples are grouped."""
    classifier = Classifier(build(family))
    alone = [step_of(classifier, [i]) for i in range(4)]
    logits = torch.cat([one for one, _ in alone])
    total = {name: sum(part[name] for _, part in alone) for name in alone[0][1]}
    evaluated = classifier.eval()(batch(range(4)))
    assert (evaluated - logits).abs().amin() > 1e-9  # dropout touches every example
    for grouping in ([(0, 1, 2, 3)], [(3, 1), (2, 0)], [(2,), (3, 0, 1)]):
        grouped = [step_of(classifier, examples) for examples in grouping]
        order = torch.tensor([i for examples in grouping for i in examples])
        torch.testing.assert_close(torch.cat([some for some, _ in grouped]), logits[order], rtol=0, atol=1e-12)
        assert all(part.isfinite().all() for _, found in grouped for part in found.values())
        for name, expected in total.items():
            found = sum(part[name] for _, part in grouped)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("group", [(0, 1, 2, 3), (0, 1, 2)])
@pytest.mark.parametrize("family", ["deberta-v2", "deberta"])
def test_disentangled_attention_too(family: str, group: tuple[int, ...]) -> None:
    classifier = Classifier(build(family, **DISENTANGLED))
    assert strays_of(classifier, batch(range(3))) < 1e-12  # learns that the table of positions belongs to no example
    assert classifier.forward_pass.shared
    logits = torch.cat([step_of(classifier, [i])[0] for i in group])
    together = step_of(classifier, group)[0]
    torch.testing.assert_close(together, logits, rtol=0, atol=1e-12)
    assert not torch.equal(step_of(classifier, group, step=6)[0], together)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_seed_step_and_row_reach_the_model_and_torch_does_not(family: str) -> None:
    classifier = Classifier(build(family))
    torch.manual_seed(1)
    logits, found = step_of(classifier, [0, 1])
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again, found_again = step_of(classifier, [0, 1])
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(logits, again)
    assert same(found, found_again)
    for other in ({"seed": 2}, {"step": 6}):
        assert (step_of(classifier, [0, 1], **other)[0] - logits).abs().amin() > 1e-9
    keys = example_keys(np.asarray([ROWS[0], ROWS[1] + 1]), seed=1, step=5)
    moved = classifier(batch([0, 1]), keys)
    torch.testing.assert_close(moved[0], logits[0], rtol=0, atol=1e-12)
    assert (moved[1] - logits[1]).abs().amin() > 1e-9


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_evaluation_is_that_of_the_stock_model(family: str) -> None:
    stock, ours = build(family).float().eval(), Classifier(build(family).float()).eval()
    assert family in MORE or stock.config._attn_implementation == "sdpa"
    with torch.no_grad():
        torch.testing.assert_close(ours(batch(range(4))), stock(**batch(range(4))).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "xlm-roberta", "electra", "modernbert", *MORE])
def test_gradient_checkpointing_of_transformers_changes_no_bit(family: str) -> None:
    model = build(family)
    if not model.supports_gradient_checkpointing:
        assert family == "mpnet"
        return
    logits, found = step_of(Classifier(copy.deepcopy(model)), range(4))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    replayed = [0]
    with counted_replays(replayed):
        again, recomputed = step_of(Classifier(model), range(4))
    assert replayed[0] > 0
    assert torch.equal(logits, again)
    assert same(found, recomputed)


@contextlib.contextmanager
def counted_replays(count: list[int]) -> Iterator[None]:
    """Count the masks that are computed after the forward pass."""
    at = ForwardPass.at

    def counting(forward_pass: ForwardPass, site: Site) -> tuple[Tensor, Tensor]:
        count[0] += forward_pass.replaying
        return at(forward_pass, site)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ForwardPass, "at", counting)
        yield


class LoraLinear(nn.Module):
    """A linear layer with a low-rank change beside it, put together as PEFT does."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(0.3)})
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x)
        for name, dropped_out in self.lora_dropout.items():
            result = result + self.lora_B[name](self.lora_A[name](dropped_out(x)))
        return result


def test_adapters_within_dictionaries_are_reached() -> None:
    model = build("bert", hidden=0.0, attention=0.0)
    layers: Any = model.base_model.encoder.layer
    for layer in layers:
        layer.attention.self.query = LoraLinear(layer.attention.self.query)
    model.double()
    classifier = Classifier(model)
    modules = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert all(isinstance(module, KeyedDropout) for module in modules)
    sites = [module.site.module for module in modules if isinstance(module, KeyedDropout)]
    assert len(set(sites)) == len(sites)
    adapters = [site for site in sites if "lora_dropout.default" in site]
    assert len(adapters) == 2
    together = step_of(classifier, range(4))[0]
    assert (together - classifier.eval()(batch(range(4)))).abs().amin() > 1e-9
    torch.testing.assert_close(together, torch.cat([step_of(classifier, [i])[0] for i in range(4)]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_nothing_of_it_is_saved(family: str, tmp_path: Path) -> None:
    stock, installed = build(family).float(), build(family).float()
    names = list(stock.state_dict())
    classifier = Classifier(installed)
    step_of(classifier, range(4))
    assert list(installed.state_dict()) == names
    assert list(classifier.state_dict()) == [f"model.{name}" for name in names]
    stock.save_pretrained(tmp_path / "stock")
    installed.save_pretrained(tmp_path / "installed")
    files = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert {"config.json", "model.safetensors"} <= set(files)
    assert files == sorted(path.name for path in (tmp_path / "installed").iterdir())
    for name in files:
        assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "installed" / name).read_bytes()


class Divided:
    """Words on a device like XLA, whose shift is a division that rounds to zero."""

    device = SimpleNamespace(type="xla")

    def __init__(self, words: torch.Tensor) -> None:
        self.words = words

    def __and__(self, mask: int) -> Divided:
        return Divided((self.words.to(torch.int32) & mask).double())

    def __rshift__(self, by: int) -> torch.Tensor:
        return self.words.div(2**by, rounding_mode="trunc").to(torch.int32)


@pytest.mark.parametrize("by", [15, 16])
def test_the_hash_is_the_same_where_a_shift_divides(by: int) -> None:
    words = torch.tensor(
        [-(2**31), -(2**31) + 1, -65537, -65536, -32769, -1, 0, 1, 65535, 2**31 - 1], dtype=torch.int32
    )
    expected = [(word % 2**32) >> by for word in words.tolist()]
    assert _shifted(words, by).tolist() == expected
    assert _shifted(Divided(words.double()), by).tolist() == expected  # type: ignore[arg-type]

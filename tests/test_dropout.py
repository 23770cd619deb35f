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
from harness import FAMILIES, SIZES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from accel_trainer import dropout
from accel_trainer.classifier import Classifier, strays
from accel_trainer.dropout import LEVELS, DropoutKeys, KeyedDropout, Site, drop, example_keys, install, keyed_attention
from accel_trainer.errors import UserError
from accel_trainer.model import DROPOUT_NAMES

Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.float64]
MODULE = "bert.encoder.layer.0.output.dropout"


def keys_of(
    rows: Sequence[int], *, seed: int = 42, step: int = 1000, module: str = MODULE, call: int = 0
) -> tuple[Tensor, Tensor]:
    """Keys of examples at a site: that of the module's call number `call` in a forward pass."""
    keys = DropoutKeys()
    keys.begin(example_keys(np.asarray(rows, dtype=np.int64), seed=seed, step=step))
    site = Site(keys, module)
    for _ in range(call):
        keys.at(site)
    return keys.at(site)


def dropped(shape: tuple[int, ...], p: float, rows: Sequence[int] = range(8), **place: Any) -> Mask:
    """Which of the values are dropped: (rows, *shape)."""
    ones = torch.ones(len(rows), *shape)
    return drop(ones, p, keys_of(rows, **place)).numpy() == 0


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
    module = KeyedDropout(0.0, Site(DropoutKeys(), "d"))
    assert module(x) is x  # without keys even
    assert KeyedDropout(0.5, Site(DropoutKeys(), "d")).eval()(x) is x


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
        keys = DropoutKeys(shared=frozenset([MODULE]))
        keys.begin(example_keys(np.asarray(rows), **{"seed": 42, "step": 1000, **key}))
        return drop(torch.ones(64, 512), 0.5, keys.at(Site(keys, MODULE))).numpy() == 0

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


class Net(nn.Module):
    """What `install` needs of a model."""

    implementation = ""
    config = SimpleNamespace(_attn_implementation="sdpa")

    def set_attn_implementation(self, implementation: str) -> None:
        self.implementation = implementation


def words(step: int = 0, rows: Sequence[int] = (3, 1, 4)) -> Tensor:
    return example_keys(np.asarray(rows), seed=42, step=step)


class Shared(Net):
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
    keys = install(net)  # type: ignore[arg-type]
    assert net.implementation == dropout.ATTENTION
    assert not [m for m in net.modules() if isinstance(m, nn.Dropout) and not isinstance(m, KeyedDropout)]
    keys.begin(words())
    once = net(ones)
    assert len({tuple(mask.flatten().tolist()) for mask in once}) == 3
    for call, mask in enumerate(once):
        assert np.array_equal(mask == 0, dropped((40,), 0.5, [3, 1, 4], step=0, module="first", call=call))
    keys.end()
    keys.begin(words())
    assert all(torch.equal(a, b) for a, b in zip(once, net(ones), strict=True))
    keys.begin(words(step=1))
    assert not any(torch.equal(a, b) for a, b in zip(once, net(ones), strict=True))


def test_a_forward_pass_that_failed_leaves_nothing_behind() -> None:
    net, ones = Shared(), torch.ones(3, 40)
    keys = install(net)  # type: ignore[arg-type]
    keys.begin(words())
    once = net(ones)
    keys.begin(words())
    net.first(ones)  # and never ended
    keys.begin(words())
    assert all(torch.equal(a, b) for a, b in zip(once, net(ones), strict=True))


def test_a_dropout_with_two_names_in_one_module_is_reached_under_both() -> None:
    net = Net()
    net.one = net.two = nn.Dropout(0.5)
    install(net)  # type: ignore[arg-type]
    assert isinstance(net.one, KeyedDropout)
    assert isinstance(net.two, KeyedDropout)


def test_probability_and_mode_are_kept_and_installing_again_changes_nothing() -> None:
    net = Net()
    net.d = nn.Dropout(0.3)
    net.e = nn.Sequential(nn.Dropout(0.7)).eval()
    keys = install(net)  # type: ignore[arg-type]
    assert net.d.p == 0.3
    assert net.e[0].p == 0.7
    ones = torch.ones(3, 40)
    keys.begin(words())
    once = net.train().d(ones)
    again = install(net)  # type: ignore[arg-type]
    again.begin(words())
    assert torch.equal(once, net.train().d(ones))
    assert not net.eval().d(ones).eq(0).any()


def test_training_without_keys_is_a_mistake_of_ours() -> None:
    net = Shared()
    keys = install(net)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="needs the keys"):
        net.train()(torch.ones(3, 4))
    keys.begin(words())
    net(torch.ones(3, 4))
    keys.begin(None)
    with pytest.raises(AssertionError, match="needs the keys"):
        net(torch.ones(3, 4))


class Layered(Net):
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


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and bool(one) and all(torch.equal(one[name], other[name]) for name in one)


def test_recomputed_layers_drop_what_they_dropped() -> None:
    found = []
    for recompute in (False, True):
        net = Layered(recompute=recompute)
        keys = install(net)  # type: ignore[arg-type]
        for step in range(3):  # micro-batches: a replay must not count as a call of the next
            keys.begin(words(step))
            y = net(torch.arange(24.0).reshape(3, 8) / 24)
            keys.end()
            y.square().sum().backward()
        found.append(gradients(net))
    assert same(*found)


def test_a_shared_layer_cannot_be_recomputed_and_says_so() -> None:
    net = Layered(recompute=True, shared=True)
    keys = install(net)  # type: ignore[arg-type]
    keys.begin(words())
    y = net(torch.ones(3, 8))
    keys.end()
    with pytest.raises(
        UserError, match=r"layers\.0\.\d is used 2 times .* without gradient \(or activation\) checkpointing"
    ):
        y.sum().backward()
    plain = Layered(recompute=False, shared=True)
    keys = install(plain)  # type: ignore[arg-type]
    keys.begin(words())
    y = plain(torch.ones(3, 8))
    keys.end()
    y.sum().backward()


# ------------------------------------------------------------------------------------------------------------------------
# Attention


class Attends(nn.Module):
    """An attention module as far as transformers' interface knows it."""

    is_causal = False

    def __init__(self, rows: Sequence[int] = (3, 1, 4), name: str = "attention") -> None:
        super().__init__()
        keys = DropoutKeys()
        keys.begin(words(rows=rows))
        self.dropout_site = Site(keys, name)


def draw_attention(b: int = 3, h: int = 2, q: int = 5, k: int = 5, d: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(b, h, q, d), (b, h, k, d), (b, h, k, d)]
    return [torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes]


def by_hand(parts: Sequence[Tensor], visible: Tensor, p: float, scaling: float) -> Tensor:
    """Attention as its definition says, one query at a time: (b, q, h, d)."""
    query, key, value = parts
    b, h, q, d = query.shape
    k = key.shape[2]
    drops = torch.from_numpy(dropped((h, q, k), p, [3, 1, 4], step=0, module="attention"))
    kept = (~drops).double() * (65536 / (65536 - round(p * 65536)))
    results = []
    for i, j, n in itertools.product(range(b), range(q), range(h)):
        seen = visible[i, j].nonzero()[:, 0]
        weights = (key[i, n, seen] @ query[i, n, j] * scaling).exp()
        results.append((weights / weights.sum() * kept[i, n, j, seen]) @ value[i, n, seen])
    return torch.stack(results).reshape(b, q, h, d)


LENGTHS_OF_KEYS = torch.tensor([5, 2, 4])
PADDED = (torch.arange(5) < LENGTHS_OF_KEYS[:, None])[:, None, None]  # (3, 1, 1, 5)
NEAR = (torch.arange(5)[:, None] - torch.arange(5)).abs() <= 1


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("case", ["all", "padded", "padded by query", "window", "causal", "causal by argument"])
def test_attention_is_softmax_times_mask(case: str, scaling: float | None, p: float) -> None:
    module, parts = Attends(), draw_attention()
    arguments: dict[str, Any] = {}
    mask: Tensor | None = None
    visible = torch.ones(3, 5, 5, dtype=torch.bool)
    if case.startswith("padded"):
        mask = PADDED if case == "padded" else PADDED.expand(3, 1, 5, 5)
        visible = PADDED.expand(3, 1, 5, 5)[:, 0]
    elif case == "window":
        mask = NEAR[None, None]
        visible = NEAR.expand(3, 5, 5)
    elif case.startswith("causal"):
        visible = torch.ones(5, 5, dtype=torch.bool).tril().expand(3, 5, 5)
        module.is_causal = case == "causal"
        arguments = {} if case == "causal" else {"is_causal": True}
    output, weights = keyed_attention(module, *parts, mask, dropout=p, scaling=scaling, **arguments)
    assert weights is None
    assert output.is_contiguous()
    expected = by_hand(parts, visible, p, 0.5 if scaling is None else scaling)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-14)
    above = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(output, parts, above)
    theirs = torch.autograd.grad(expected, parts, above)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def test_without_dropout_or_in_evaluation_attention_is_the_fused_one() -> None:
    parts = draw_attention()
    plain = nn.functional.scaled_dot_product_attention(*parts, attn_mask=PADDED).transpose(1, 2)
    module = Attends()
    for training, p in ((True, 0.0), (False, 0.5)):
        output, _ = keyed_attention(module.train(training), *parts, PADDED, dropout=p)
        assert torch.equal(output, plain)
    dropping, _ = keyed_attention(module.train(), *parts, PADDED, dropout=1e-4)
    assert not torch.equal(dropping, plain)
    # And what the explicit path computes is that, but for the mask: with one that keeps nearly all, nearly the same.
    torch.testing.assert_close(dropping, plain, rtol=0, atol=1e-3)


def test_a_query_that_sees_no_key_gives_numbers() -> None:
    """As a padded token does that stands farther from any real one than ModernBERT's window reaches."""
    visible = NEAR & (torch.arange(5) < 2)  # queries 3 and 4 see nothing
    assert (visible.sum(-1) == 0).tolist() == [False, False, False, True, True]
    parts = draw_attention()
    output, _ = keyed_attention(Attends(), *parts, visible[None, None], dropout=0.5)
    assert output.isfinite().all()
    gradient = torch.autograd.grad(output.sum(), parts)
    assert all(part.isfinite().all() for part in gradient)
    seen, _ = keyed_attention(Attends(), *parts, visible[None, None], dropout=0.5)
    expected = by_hand([parts[0][:, :, :3], *parts[1:]], visible[:3].expand(3, 3, 5), 0.5, 0.5)
    torch.testing.assert_close(seen[:, :3], expected, rtol=0, atol=1e-14)


def test_a_query_that_sees_no_key_gives_numbers_in_float16_too() -> None:
    query, key, value = (part.detach().half() for part in draw_attention())
    key = -key.abs() - 1
    query = torch.full_like(query, 6.0)  # scores near -21
    output, _ = keyed_attention(Attends(), query, key, value, torch.zeros(1, 1, 5, 5, dtype=torch.bool), dropout=0.5)
    assert output.isfinite().all()


def test_a_mask_may_be_numbers_to_add() -> None:
    parts = draw_attention()
    numbers = torch.zeros(PADDED.shape, dtype=torch.float64).masked_fill(~PADDED, -math.inf)
    truths, added = (keyed_attention(Attends(), *parts, mask, dropout=0.5)[0] for mask in (PADDED, numbers))
    assert torch.equal(truths, added)
    bias = torch.randn(3, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    plain = nn.functional.scaled_dot_product_attention(*parts, attn_mask=bias).transpose(1, 2)
    nearly, _ = keyed_attention(Attends(), *parts, bias, dropout=1e-5)  # one level: none of these 150 weights falls
    torch.testing.assert_close(nearly, plain * (65536 / 65535), rtol=0, atol=1e-14)


def test_what_is_masked_has_no_weight_at_all() -> None:
    parts = draw_attention()
    changed = [part.detach().clone() for part in parts]
    for part in changed[1:]:
        part[1, :, 2:] = 1e6  # padding of the second example
    outputs = [keyed_attention(Attends(), *some, PADDED, dropout=0.5)[0] for some in (parts, changed)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_types_are_normalized_in_float32(dtype: torch.dtype) -> None:
    parts = [part.detach().to(dtype) for part in draw_attention(k=5)]
    output, _ = keyed_attention(Attends(), *parts, PADDED, dropout=0.5)
    assert output.dtype == dtype
    wide, _ = keyed_attention(Attends(), *[part.double() for part in parts], PADDED, dropout=0.5)
    torch.testing.assert_close(output.double(), wide, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("bend", ["softcap", "position_bias"])
def test_scores_that_are_bent_are_refused(bend: str) -> None:
    with pytest.raises(UserError, match=r"model\.attention_dropout: .* set the key to 0\.0"):
        keyed_attention(Attends(), *draw_attention(), None, dropout=0.5, **{bend: torch.ones(1)})


def test_grouped_queries_share_their_keys() -> None:
    query = draw_attention(h=4)[0]
    key, value = draw_attention(h=2)[1:]
    module = Attends()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    output, _ = keyed_attention(module, query, key, value, None, dropout=0.5)
    repeated = [part.repeat_interleave(2, 1) for part in (key, value)]
    assert torch.equal(output, keyed_attention(Attends(), query, *repeated, None, dropout=0.5)[0])


# ------------------------------------------------------------------------------------------------------------------------
# Models

# Families beyond those of the recipes: with attention of their own, and one that looks back only.
MORE: dict[str, dict[str, Any]] = {
    "mpnet": {**SIZES, "max_position_embeddings": 34},
    "deberta-v2": {**SIZES, "max_position_embeddings": 32},
    "roformer": {**SIZES, "max_position_embeddings": 32},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "summary_first_dropout": 0.1},
}
# As published: disentangled attention, whose position embeddings are dropped out of once for the whole micro-batch.
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_position_embeddings": 32}
LENGTHS = (5, 16, 12, 3)
ROWS = (7, 100, 3, 51)


def build(family: str, hidden: float = 0.1, attention: float = 0.1, **more: Any) -> PreTrainedModel:
    """A tiny classifier in float64, with the same weights each time."""
    sizes = {**FAMILIES, **MORE}.get(family, SIZES)
    config = AutoConfig.for_model(family, vocab_size=50, num_labels=3, pad_token_id=0, **{**sizes, **more})
    for field, p in (("hidden_dropout", hidden), ("attention_dropout", attention), ("classifier_dropout", hidden)):
        for name in DROPOUT_NAMES[field]:
            if hasattr(config, name):
                setattr(config, name, p)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return model.double()


def batch(examples: Sequence[int]) -> dict[str, Tensor]:
    """Some of the four examples, padded to the longest of them."""
    generator = np.random.default_rng(0)
    tokens = [generator.integers(5, 50, length).tolist() for length in LENGTHS]
    longest = max(LENGTHS[i] for i in examples)
    padding = {i: [0] * (longest - LENGTHS[i]) for i in examples}
    return {
        "input_ids": torch.tensor([tokens[i] + padding[i] for i in examples]),
        "attention_mask": torch.tensor([[1] * LENGTHS[i] + padding[i] for i in examples]),
    }


def step_of(classifier: Classifier, examples: Sequence[int], **key: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of a micro-batch in training."""
    keys = example_keys(np.asarray([ROWS[i] for i in examples]), **{"seed": 1, "step": 5, **key})
    logits = classifier.train()(batch(examples), keys)
    # Of another weight in each example.
    (logits * torch.tensor([[0.5], [1.0], [-1.0], [2.0]], dtype=logits.dtype)[list(examples)]).square().sum().backward()
    return logits.detach(), gradients(classifier)


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
    assert strays(classifier, batch(range(3))) < 1e-12  # learns that the table of positions belongs to no example
    assert classifier.dropout_keys.shared
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


def test_attention_that_bends_its_scores_is_left_as_it_is() -> None:
    """Gemma 2 caps them, which torch's fused attention cannot: its own stays, and is found to draw."""
    sizes = {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32}
    stock, ours = build("gemma2", **sizes), Classifier(build("gemma2", **sizes))
    assert ours.model.config._attn_implementation == stock.config._attn_implementation == "eager"
    with torch.no_grad():
        assert torch.equal(ours.eval()(batch(range(4))), stock.eval()(**batch(range(4))).logits)
    assert strays(ours, batch(range(4))) == math.inf


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_hidden_states_have_dropout_each(family: str) -> None:
    evaluated = Classifier(build(family)).eval()(batch(range(4)))
    for hidden, attention in ((0.1, 0.0), (0.0, 0.1)):
        classifier = Classifier(build(family, hidden, attention))
        assert (step_of(classifier, range(4))[0] - evaluated).abs().amin() > 1e-9
    classifier = Classifier(build(family, 0.0, 0.0))
    torch.testing.assert_close(step_of(classifier, range(4))[0], evaluated, rtol=0, atol=1e-12)


def test_attention_in_a_model_is_its_eager_one_with_our_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' own explicit attention, with our masks in the place of torch's."""
    classifier, stock = Classifier(build("bert", hidden=0.0)), build("bert", hidden=0.0).train()
    logits, found = step_of(classifier, range(4))
    stock.set_attn_implementation("eager")
    layers = iter(range(2))
    torch_dropout = nn.functional.dropout

    def keyed(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if x.dim() != 4:
            return torch_dropout(x, p, training, inplace)
        assert p == 0.1
        module = f"bert.encoder.layer.{next(layers)}.attention.self"
        return drop(x, p, keys_of(ROWS, seed=1, step=5, module=module))

    monkeypatch.setattr(nn.functional, "dropout", keyed)
    expected = stock(**batch(range(4))).logits
    assert next(layers, None) is None
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    (expected * torch.tensor([[0.5], [1.0], [-1.0], [2.0]])).square().sum().backward()
    for name, gradient in gradients(stock).items():
        torch.testing.assert_close(found[f"model.{name}"], gradient, rtol=0, atol=1e-12)


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
    at = DropoutKeys.at

    def counting(keys: DropoutKeys, site: Site) -> tuple[Tensor, Tensor]:
        count[0] += keys.replaying
        return at(keys, site)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DropoutKeys, "at", counting)
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

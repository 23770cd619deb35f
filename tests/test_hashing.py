"""A hash is a pure function of its key and value, written down here once more; its bits look like coin flips."""

from __future__ import annotations

import warnings
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_trainer.hashing import GOLDEN, Purpose, Words, keyed, mix

WORD = st.integers(0, 2**64 - 1)
KEYS = st.lists(WORD, max_size=4)
MASK = 2**64 - 1


def most(count: int) -> float:
    """Standard deviations that the largest of `count` normal deviates exceeds once in 10^5 repetitions.

    By the union bound, so that the `count` need not be independent. Bits are counted often enough for the
    binomial to be normal as far out as this: a fair coin's has no skew, and lighter tails.
    """
    return NormalDist().inv_cdf(1 - 1e-5 / (2 * count))


def fairness(heads: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.float64]:
    """Numbers of heads in n flips of a fair coin, in standard deviations from n/2."""
    return abs(heads - n / 2) / np.sqrt(n / 4)


def bits(words: Words) -> npt.NDArray[np.uint8]:
    """The 64 bits of each word, the lowest first, on a new last axis."""
    octets = np.ascontiguousarray(words).astype("<u8").view(np.uint8).reshape(*np.shape(words), 8)
    return np.unpackbits(octets, axis=-1, bitorder="little")


def all_different(words: Words) -> bool:
    ordered = np.sort(words)
    return bool((ordered[1:] != ordered[:-1]).all())


# Once more, in Python's unbounded integers.


def plain_mix(word: int) -> int:
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & MASK
    return word ^ (word >> 31)


def plain_unmix(word: int) -> int:
    """What `plain_mix` made it of: right shifts undone by repetition, multiplications by the inverse modulo 2⁶⁴."""
    word ^= (word >> 31) ^ (word >> 62)
    word = word * pow(0x94D049BB133111EB, -1, 2**64) & MASK
    word ^= (word >> 27) ^ (word >> 54)
    word = word * pow(0xBF58476D1CE4E5B9, -1, 2**64) & MASK
    return word ^ (word >> 30) ^ (word >> 60)


def plain_keyed(value: int, key: list[int]) -> int:
    state = 0
    for part in key:
        state = plain_mix(state + 0x9E3779B97F4A7C15 & MASK) ^ part
    return plain_mix(plain_mix(state) + value * 0x9E3779B97F4A7C15 & MASK)


def test_the_finalizer_is_that_of_splitmix64() -> None:
    # First numbers of SplitMix64 from seed 1234567, as its ports are checked with (Rosetta Code, "Splitmix64").
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    states = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * GOLDEN
    assert mix(states).tolist() == published


@given(st.lists(WORD, min_size=1, max_size=5), KEYS)
def test_equals_the_plain_definition(values: list[int], key: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # overflows are meant, and must not be told
        hashes = keyed(np.asarray(values, dtype=np.uint64), *key)
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == [plain_keyed(value, key) for value in values]


@given(WORD, KEYS)
def test_the_value_comes_back_from_the_hash(value: int, key: list[int]) -> None:
    """Bijective under every key: each step can be undone, the odd factor included."""
    start, end = (plain_unmix(int(keyed([word], *key)[0])) for word in (0, value))
    assert (end - start) * pow(int(GOLDEN), -1, 2**64) & MASK == value


@pytest.mark.parametrize("key", [(), (0,), (Purpose.DROPOUT, 42, 7), (2**64 - 1,) * 3])
def test_a_million_values_never_meet(key: tuple[int, ...]) -> None:
    low = np.arange(10**6, dtype=np.uint64)
    values = np.concatenate([low, ~low, low[1:] << np.uint64(44)])
    assert all_different(values)
    assert all_different(keyed(values, *key))


def test_a_million_values_under_many_keys_never_meet() -> None:
    # By chance two of 8·10^6 words of 64 bits would: once in half a million such sets.
    keys = [(1,), (2,), (1, 0), (0, 1), (1, 1), (2**63,), (5, 42, 0), (5, 42, 1)]
    assert all_different(np.concatenate([keyed(np.arange(10**6), *key) for key in keys]))


def test_is_pure_and_takes_any_shape() -> None:
    values = np.arange(24)[::-1].reshape(2, 3, 4)
    first = keyed(values, 5, 6)
    assert first.shape == (2, 3, 4)
    assert np.array_equal(values, np.arange(24)[::-1].reshape(2, 3, 4))
    assert np.array_equal(first, keyed(values, 5, 6))
    assert np.array_equal(first.ravel(), [keyed([value], 5, 6)[0] for value in values.ravel().tolist()])
    assert np.array_equal(first, keyed(values.astype(np.int32), 5, 6))
    assert keyed(np.zeros((0, 3), dtype=np.int64), 1).shape == (0, 3)


def test_keys_that_do_not_fit_are_refused() -> None:
    for part in (-1, 2**64):
        with pytest.raises(AssertionError):
            keyed([0], 1, part)


def test_every_part_of_the_key_counts_and_so_does_their_order() -> None:
    base = (3, 42, 7)
    keys = {base, (), (3,), (3, 42), (0, 3, 42, 7), (3, 42, 7, 0), (3, 0, 42, 7), (42, 3, 7), (7, 42, 3), (3, 7, 42)}
    keys |= {(*base[:i], base[i] ^ (1 << bit), *base[i + 1 :]) for i in range(3) for bit in range(64)}
    keys |= {(0,) * length for length in range(1, 6)}
    hashes = [tuple(keyed(np.arange(4), *key).tolist()) for key in keys]
    assert len(keys) == 207
    assert len({word for words in hashes for word in words}) == 4 * len(keys)


@given(KEYS, KEYS)
def test_different_keys_hash_differently(one: list[int], other: list[int]) -> None:
    same = np.array_equal(keyed(np.arange(3), *one), keyed(np.arange(3), *other))
    assert same == (one == other)


@pytest.mark.parametrize(("varied", "n"), [("value", 200_000), ("first", 10_000), ("last", 10_000)])
def test_every_bit_is_balanced_and_so_is_every_pair_of_bits(varied: str, n: int) -> None:
    """For values that count up under one key, and for one value under keys that count up in their first or last part."""
    if varied == "value":
        words = keyed(np.arange(n), Purpose.DROPOUT, 42, 0)
    else:
        keys = ((k, 42, 1) if varied == "first" else (Purpose.DROPOUT, 42, k) for k in range(n))
        words = np.concatenate([keyed([0], *key) for key in keys])
    signs = bits(words).astype(np.float32) * 2 - 1  # ±1; so few of them are summed exactly in float32
    assert fairness((signs.sum(0) + n) / 2, n).max() < most(64)
    # Products of two bits, within a word and of neighbouring words, are fair coins too.
    within = signs.T @ signs
    assert abs(within[np.triu_indices(64, 1)]).max() / np.sqrt(n) < most(64 * 63 // 2)
    across = signs[:-1].T @ signs[1:]
    assert abs(across).max() / np.sqrt(n - 1) < most(64 * 64)


@pytest.mark.parametrize("varied", ["value", "first", "last"])
def test_avalanche(varied: str) -> None:
    """Whichever of the 64 bits of a value, or of a part of the key, is flipped: every bit of the hash flips half the time."""
    n = 4096 if varied == "value" else 200
    draw = np.random.default_rng(0)
    values = draw.integers(0, 2**16, n)  # small, as rows, steps and seeds are
    flips = np.zeros((64, 64), dtype=np.int64)
    if varied == "value":
        hashes = keyed(values, 1, 42)
        for i in range(64):
            flips[i] = bits(hashes ^ keyed(values.astype(np.uint64) ^ np.uint64(1 << i), 1, 42)).sum(0)
    else:
        for part in values.tolist():
            keys = [part, *(part ^ (1 << i) for i in range(64))]
            words = np.concatenate([keyed([9], *((key, 42) if varied == "first" else (42, key))) for key in keys])
            flips += bits(words[1:] ^ words[0])
    assert fairness(flips, n).max() < most(64 * 64)


def test_bytes_are_uniform() -> None:
    """Chi-square of the values of each of the eight bytes: 255 degrees of freedom, whose deviation is 22.6."""
    n = 200_000
    octets = keyed(np.arange(n), Purpose.TRAINING, 1, 2).view(np.uint8).reshape(n, 8)
    for place in range(8):
        counts = np.bincount(octets[:, place], minlength=256)
        statistic = ((counts - n / 256) ** 2 / (n / 256)).sum()
        # Wilson and Hilferty: the cube root of a chi-square over its freedom is as good as normal.
        deviate = ((statistic / 255) ** (1 / 3) - (1 - 2 / (9 * 255))) / np.sqrt(2 / (9 * 255))
        assert abs(deviate) < most(8)


def test_the_purposes_are_all_different_keys() -> None:
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "TRAINING": 1,
        "SHUFFLE": 2,
        "SPLIT": 3,
        "SUBSET": 4,
        "DROPOUT": 5,
        "SHARED_DROPOUT": 6,
    }


def test_the_hashes_are_those_that_recorded_results_were_made_with() -> None:
    """Whoever changes these numbers changes what every seed means: raise the version, and run the recipes again."""
    for (value, *key), expected in RECORDED.items():
        assert keyed([value], *key).tolist() == [expected]
        assert plain_keyed(value, key) == expected


# Value and key → hash.
RECORDED = {
    (1,): 0xE220A8397B1DCDAF,
    (0, 0): 0x33FE8BD4F9C57863,
    (0, 1, 42, 0): 0x84E3974AA19C63BB,
    (3, 5, 42, 0): 0x24F0D22A99179F15,
    (3, 5, 42, 1): 0xB1C4275EE75E8FD8,
    (3, 5, 43, 0): 0x0E3AC7E667D17038,
    (4, 5, 42, 0): 0x41B99A157F4BC9FE,
    (2**64 - 1, 2**64 - 1, 2**63): 0x1E9D0EDADECC45AB,
}

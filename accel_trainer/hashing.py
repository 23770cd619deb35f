"""Hashes of integers: where orders and dropout masks come from, instead of any library's random stream.

Everything here is a pure function of whole numbers with a fixed width, so that a seed means the same on every machine,
in every version and however often it is asked.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ ÷ the golden ratio, the increment of SplitMix64


class Purpose(IntEnum):
    """What a hash is for; part of its key, so that one seed gives unrelated numbers for unrelated uses."""

    TRAINING = 1
    SHUFFLE = 2
    SPLIT = 3
    SUBSET = 4
    DROPOUT = 5
    SHARED_DROPOUT = 6


def mix(words: Words) -> Words:
    """A bijective hash of 64-bit words: the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def keyed(values: npt.ArrayLike, *key: int) -> Words:
    """Hash `values`, each a whole number in [0, 2⁶⁴), under a key: different values never meet under the same key.

    Args:
        values: any shape.
        key: whole numbers in [0, 2⁶⁴); the result depends on every one and on their order.

    Returns:
        uint64, of the shape of `values`.
    """
    assert all(0 <= part < 2**64 for part in key)
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = mix(state + GOLDEN) ^ np.asarray([part], dtype=np.uint64)
    return mix(mix(state) + np.asarray(values, dtype=np.uint64) * GOLDEN)

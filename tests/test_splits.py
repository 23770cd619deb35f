"""The language of slices: parsed as written, rounded one way, never out of bounds."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_trainer.splits import Slice, parse_slices


def bounds(expression, n):
    (piece,) = parse_slices(expression)
    return piece.bounds(n)


@pytest.mark.parametrize(
    ("expression", "n", "expected"),
    [
        ("train", 10, (0, 10)),
        ("train[:]", 10, (0, 10)),
        ("train[:4]", 10, (0, 4)),
        ("train[4:]", 10, (4, 10)),
        ("train[2:5]", 10, (2, 5)),
        ("train[-3:]", 10, (7, 10)),
        ("train[:-3]", 10, (0, 7)),
        ("train[-5:-2]", 10, (5, 8)),
        ("train[:99]", 10, (0, 10)),
        ("train[-99:]", 10, (0, 10)),
        ("train[20:]", 10, (10, 10)),
        ("train[7:3]", 10, (7, 7)),
        ("train[:80%]", 10, (0, 8)),
        ("train[80%:]", 10, (8, 10)),
        ("train[-20%:]", 10, (8, 10)),
        ("train[:100%]", 7, (0, 7)),
        ("train[:0%]", 7, (0, 0)),
        ("train[:33.3%]", 1000, (0, 333)),
        ("train[:12.5%]", 12, (0, 2)),  # 1.5 rows
        ("train[:12.5%]", 20, (0, 2)),  # 2.5 rows: halves to even
        ("train[:29%]", 100, (0, 29)),  # 0.29 * 100 is 28.999… in binary
        ("train[:57.5%]", 1000, (0, 575)),
        ("train[ 1 : 3 ]", 10, (1, 3)),
        ("  train  [1:3]  ", 10, (1, 3)),
        ("un-super.vised_2[:1]", 10, (0, 1)),
    ],
)
def test_bounds(expression, n, expected):
    assert bounds(expression, n) == expected


@given(st.integers(0, 10_000), st.one_of(st.none(), st.integers(-99, 99)), st.one_of(st.none(), st.integers(-99, 99)))
def test_integers_mean_what_they_mean_in_python(n, start, stop):
    if start == 0 or stop == 0:  # a negative zero cannot be drawn, and zero is Python's
        assert bounds("train[0:]", n) == (0, n)
    expression = f"train[{'' if start is None else start}:{'' if stop is None else stop}]"
    assert list(range(*bounds(expression, n))) == list(range(n))[start:stop]


PERCENT = st.decimals(0, 100, places=2)


@given(st.integers(0, 10**7), st.lists(PERCENT, max_size=5))
def test_cuts_at_the_same_percentages_share_no_row_and_miss_none(n, cuts):
    edges = ["", *map(str, sorted(cuts)), ""]
    pieces = [bounds(f"train[{a + '%' if a else ''}:{b + '%' if b else ''}]", n) for a, b in itertools.pairwise(edges)]
    assert pieces[0][0] == 0
    assert pieces[-1][1] == n
    assert all(one[1] == two[0] for one, two in itertools.pairwise(pieces))


@given(st.integers(0, 10**12), PERCENT)
def test_percentages_round_to_the_nearest_row(n, percent):
    _, stop = bounds(f"train[:{percent}%]", n)
    assert abs(stop - Fraction(str(percent)) * n / 100) <= Fraction(1, 2)


def test_several_slices_stay_in_order():
    assert parse_slices("train[:100] + test[-100:]+extra") == (
        Slice("train", None, "100"),
        Slice("test", "-100", None),
        Slice("extra", None, None),
    )


@pytest.mark.parametrize("expression", ["train", "train[:8000]", "train[80%:]", "a-b[1:-2]", "train[12.5%:50%]"])
def test_a_slice_is_written_as_it_was_read(expression):
    (piece,) = parse_slices(expression)
    assert str(piece) == expression
    assert parse_slices(str(piece)) == (piece,)


@pytest.mark.parametrize(
    ("expression", "part"),
    [
        ("", "''"),
        ("train[", "'train['"),
        ("train[5]", "'train[5]'"),
        ("train[1:2:3]", "'train[1:2:3]'"),
        ("train[a:b]", "'train[a:b]'"),
        ("train[:10]+", "''"),
        ("train test", "'train test'"),
        ("[:10]", "'[:10]'"),
        ("train[:1.5]", "'1.5'"),
        ("train[:1..5%]", "'1..5%'"),
        ("train[:.5%]", "'.5%'"),
        ("train[:101%]", "101%"),
        ("train[-100.5%:]", "-100.5%"),
        ("train[:--5]", "'train[:--5]'"),
    ],
)
def test_what_is_no_slice_is_refused_by_name(expression, part):
    with pytest.raises(ValueError, match=r"is no slice|is no bound|beyond the whole") as error:
        parse_slices(expression)
    assert part in str(error.value)

"""Cells become class ids as a person would read them, or one message says where and why not."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_trainer.errors import DataError
from accel_trainer.labels import canonical, infer_names, is_unlabelled, label_ids, rare_classes, same_spelling

SENTIMENT = ["NEGATIVE", "POSITIVE"]


def place(row):
    return f"reviews.csv, row {row}"


def ids(values, names=SENTIMENT, mapping=None):
    return label_ids(values, names, mapping, place)[0].tolist()


def refused(values, names=SENTIMENT, mapping=None):
    with pytest.raises(DataError) as error:
        label_ids(values, names, mapping, place)
    return str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        [0, 1, 1],
        [0.0, 1.0, 1.0],
        [False, True, True],
        ["0", "1", "1"],
        [" 0", "1 ", "1"],
        ["NEGATIVE", "POSITIVE", " POSITIVE\n"],
        ["negative", "Positive", "positive"],
        ["neg", "pos", "POS"],
        ["nega", "positiv", "pos"],
        [np.int64(0), np.float64(1.0), np.bool_(True)],
        np.asarray([0, 1, 1], dtype=np.int8),
        np.asarray([0, 1, 1], dtype=np.float32),
    ],
)
def test_what_is_read_as_a_class(values):
    found, _ = label_ids(values, SENTIMENT, None, place)
    assert found.tolist() == [0, 1, 1]
    assert found.dtype == np.int64


@given(st.lists(st.text(min_size=1).map(str.strip).filter(bool), min_size=2, max_size=8, unique=True), st.data())
def test_names_as_they_stand_are_always_themselves(names, data):
    names = [name for name in names if not is_unlabelled(name)]
    values = data.draw(st.lists(st.sampled_from(names), max_size=20)) if names else []
    found, guessed = label_ids(values, names, None, place)
    assert [names[i] for i in found] == values
    assert guessed == {}


def test_what_was_guessed_is_told_and_what_stands_there_is_not():
    assert label_ids(["neg", "POSITIVE", "positive", "1", 0], SENTIMENT, None, place)[1] == {
        "neg": "NEGATIVE",
        "positive": "POSITIVE",
    }


@pytest.mark.parametrize("value", [None, -1, -1.0, "-1", " -1 ", "", "  ", "\t\n", float("nan"), np.float32("nan")])
def test_what_is_no_label(value):
    assert is_unlabelled(value)
    assert ids([0, value, "POSITIVE"]) == [0, -1, 1]


@pytest.mark.parametrize("value", [0, 0.0, False, True, "0", "nan", "None", "-", -2, "1"])
def test_what_is_one(value):
    assert not is_unlabelled(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, 1),
        (False, 0),
        (np.bool_(True), 1),
        (3.0, 3),
        (np.float32(2), 2),
        (np.int8(4), 4),
        (1.5, "1.5"),
        (" a ", "a"),
    ],
)
def test_canonical(value, expected):
    found = canonical(value)
    assert found == expected
    assert type(found) is type(expected)


def test_an_abbreviation_must_fit_one_name_alone_and_have_three_letters():
    names = ["negative", "neutral", "positive"]
    assert ids(["neu", "neg", "pos"], names) == [1, 0, 2]
    assert "'ne'" in refused(["positive", "ne"], names)
    assert "'po'" in refused(["po"], names)
    assert "'posh'" in refused(["posh"], names)
    assert "'pos'" in refused(["pos"], ["positive", "possible"])


def test_names_that_differ_in_case_only_are_kept_apart():
    assert ids(["us", "US"], ["US", "us"]) == [1, 0]
    assert "'Us'" in refused(["Us"], ["US", "us"])


def test_integers_are_names_or_ids_and_never_some_of_each():
    stars = ["1", "2", "3", "4", "5"]
    assert ids([1, 5, 3], stars) == [0, 4, 2]
    assert ids(["1", "5", "3"], stars) == [0, 4, 2]
    assert ids([0, 1, 2, 3, 4], stars) == [0, 1, 2, 3, 4]  # counted from 0: read one by one, 0 and 1 would both be "1"
    assert "'0'" in refused([0, 1, 5], stars)
    assert "'6'" in refused([1, 2, 6], stars)
    assert "'2'" in refused([0, 1, 2])
    assert ids([1, 0], ["1", "0"]) == [0, 1]


def test_minus_one_is_a_class_where_the_recipe_says_so():
    assert ids([-1, "0", 1.0], ["negative", "positive"], {"-1": "negative", "0": "negative", "1": "positive"}) == [
        0,
        0,
        1,
    ]
    assert ids([-1, 0, 1, None], ["-1", "0", "1"]) == [0, 1, 2, -1]


def test_a_mapping_is_taken_at_its_word():
    mapping = {"差评": "NEGATIVE", "1": "NEGATIVE", "2": "NEGATIVE", "5": "POSITIVE"}
    found, guessed = label_ids(["差评", 5, 1, 2.0, None], SENTIMENT, mapping, place)
    assert found.tolist() == [0, 1, 0, 0, -1]
    assert guessed == {}
    for value in ["NEGATIVE", 0, "positive", 3]:
        assert repr(str(value)) in refused([value], mapping=mapping)


def test_an_unknown_label_is_named_with_its_first_place_and_count():
    message = refused(["POSITIVE", "postive", "NEGATIVE", "postive", "meh", "postive"])
    assert "reviews.csv, row 1" in message
    assert "'postive'" in message
    assert "NEGATIVE, POSITIVE" in message
    assert "did you mean 'POSITIVE'" in message
    assert "3 rows" in message
    assert "1 more unknown value;" in message
    assert "dataset.labels" in message
    assert "it stands in 1 row;" in refused(["meh"])
    assert "did you mean 'good'" in refused(["god"], mapping={"good": "POSITIVE", "bad": "NEGATIVE"})


@pytest.mark.parametrize("value", [2, -2, 1.5, "2", "1.0", "³"])
def test_numbers_outside_are_refused(value):
    assert repr(str(canonical(value))) in refused([0, 1, value])


def test_no_rows_have_no_labels():
    assert label_ids([], SENTIMENT, None, place)[0].shape == (0,)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["b", "a", "b", None, ""], ["a", "b"]),
        ([10, 2, 1, -1], ["1", "2", "10"]),
        (["10", "2", "1"], ["1", "2", "10"]),
        ([1.0, 0.0, float("nan")], ["0", "1"]),
        ([True, False], ["0", "1"]),
        (["10", "b", "9"], ["10", "9", "b"]),
        ([0.5, 1.0], ["0.5", "1"]),
        (["好", "坏"], ["坏", "好"]),
    ],
)
def test_inferred_names_are_the_sorted_values(values, names):
    assert infer_names(values, "label") == names


@given(st.lists(st.one_of(st.integers(0, 30), st.sampled_from(["01", "1", "02", "a", " b", "B"])), min_size=1))
def test_inferred_names_know_every_row_and_no_order(values):
    if len({type(value) for value in values}) > 1:
        values = [str(value) for value in values]
    names = infer_names(values, "label")
    assert len(set(names)) == len(names)
    assert [names[i] for i in ids(values, names)] == [str(canonical(value)) for value in values]
    shuffled = random.Random(0).sample(values, len(values))
    assert infer_names(shuffled, "label") == names


def test_codes_with_leading_zeros_stay_themselves():
    names = infer_names(["03", "01", "02"], "label")
    assert names == ["01", "02", "03"]
    assert ids(["01", "02", "03"], names) == [0, 1, 2]


@pytest.mark.parametrize("count", [51, 1001])
def test_a_column_of_texts_is_no_label_column(count):
    with pytest.raises(DataError, match="label_column") as error:
        infer_names([f"text {i}" for i in range(count)], "review")
    assert f"'review' holds {count} different values" in str(error.value)
    assert "'text 0'" in str(error.value)


def test_many_classes_are_fine_where_rows_repeat_them():
    assert len(infer_names([f"intent {i % 150}" for i in range(1000)], "label")) == 150
    assert len(infer_names([f"class {i % 1000}" for i in range(5000)], "label")) == 1000
    with pytest.raises(DataError):
        infer_names([f"class {i % 1001}" for i in range(5000)], "label")
    assert len(infer_names([f"rare {i}" for i in range(50)], "label")) == 50


@pytest.mark.parametrize("values", [[1, 2, 1], ["2", "1"], [2.0]])
def test_labels_counted_from_one_are_told_apart(values):
    message = refused(values)
    assert "counted from 1" in message
    assert "set dataset.labels: {1: NEGATIVE, 2: POSITIVE}" in message
    assert label_ids(values, SENTIMENT, {"1": "NEGATIVE", "2": "POSITIVE"}, place)[0].max() == 1


@pytest.mark.parametrize("values", [[0, 2], [1, 3], [1, 2, "meh"]])
def test_other_unknown_labels_are_not_said_to_count_from_one(values):
    assert "counted from 1" not in refused(values)


@pytest.mark.parametrize(
    ("counts", "rare"),
    [([500, 480, 1], [2]), ([2, 300], [0]), ([3, 300], []), ([2, 19], []), ([2, 20], [0]), ([2, 2, 0, 40], [0, 1]), ([1] * 19 + [20], [*range(19)]), ([1] * 20 + [20], []), ([0, 90], [])],
)  # fmt: skip
def test_classes_of_a_row_or_two(counts, rare):
    assert rare_classes(counts) == rare


def test_names_that_only_their_spelling_keeps_apart():
    names = ["Positive", "positive", "very good", "very_good", "ＡＢ", "ab", "C", "C++", "-1", "1", "好", "好评"]
    assert same_spelling(names) == [("Positive", "positive"), ("very good", "very_good"), ("ＡＢ", "ab")]
    assert same_spelling(["a", "b", "1", "2"]) == []

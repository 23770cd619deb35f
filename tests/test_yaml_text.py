"""YAML 1.2 in and out, whatever the values are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_files import MINIMAL, SCALARS

from accel_trainer.draft import ABSENT, Draft
from accel_trainer.recipe_file import parse_recipe
from accel_trainer.yaml_text import read_scalar, read_yaml, write_yaml


@pytest.mark.parametrize(("written", "value"), SCALARS)
def test_scalars_follow_yaml_1_2(written: str, value: object) -> None:
    from_config = "model: {tokenizer: org/t, from_config: {model_type: bert}}"
    text = MINIMAL.replace("model: {checkpoint: org/model}", from_config)
    in_file = text.replace("bert", f"bert, x: {written}")
    for recipe in (parse_recipe(in_file, "r"), parse_recipe(text, "r", [f"model.from_config.x={written}"])):
        assert recipe.model.from_config is not None
        read = recipe.model.from_config["x"]
        assert (type(read), read) == (type(value), value)
    if not written.startswith(("'", '"')):
        assert read_scalar(written) == value


BREAKS = ["\n", "a\r\n b", "\x85", "a\x85b", "\u2028 a", "\ufeff"]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    [*BREAKS, *(text for text, _ in SCALARS)]
)
SINGLES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
PLAIN = st.recursive(SINGLES, lambda below: st.lists(below, max_size=3) | st.dictionaries(TEXTS, below, max_size=3))


@settings(max_examples=100)
@given(st.dictionaries(TEXTS, PLAIN, min_size=1, max_size=3))
def test_plain_values_are_read_back(values: dict[str, Any]) -> None:
    draft = Draft("r")
    assert read_yaml(write_yaml(values), draft) == values
    assert not draft.mistakes


def test_every_value_has_its_line_and_what_was_written() -> None:
    draft = Draft("r")
    assert read_yaml("# head\na:\n  b: 0x10\n  c:\n    - x\n", draft) == {"a": {"b": 16, "c": ["x"]}}
    assert {keys: (spot.line, spot.written) for keys, spot in draft.spots.items()} == {
        (): (1, "a:\n  b: 0x10\n  c:\n    - x"),
        ("a",): (2, "b: 0x10\n  c:\n    - x"),
        ("a", "b"): (3, "0x10"),
        ("a", "c"): (4, "- x"),
        ("a", "c", 0): (5, "x"),
    }
    assert read_yaml("# nothing\n", draft) is ABSENT


def test_scalars_below_given_keys_stay_text() -> None:
    text = "a: {0: 1, true: null}\nb: 1\n"
    assert read_yaml(text, Draft("r"), texts=("a",)) == {"a": {"0": "1", "true": None}, "b": 1}

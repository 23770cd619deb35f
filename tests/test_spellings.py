"""The tables of other names are complete, and every entry leads somewhere."""

from __future__ import annotations

import dataclasses

from accel_trainer.recipe import Recipe
from accel_trainer.recipe_fields import field_of
from accel_trainer.spellings import ANSWERED, ANSWERED_VALUES, RENAMED, TRANSLATED

SCHEMA = Recipe.model_json_schema()
FIELDS = {name for section in [SCHEMA, *SCHEMA["$defs"].values()] for name in section["properties"]}


def test_every_training_argument_is_known() -> None:
    from transformers import TrainingArguments

    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert not names - FIELDS - RENAMED.keys() - ANSWERED.keys()


def test_every_name_stands_in_one_table() -> None:
    assert not RENAMED.keys() & ANSWERED.keys()
    assert not FIELDS & RENAMED.keys()
    assert not FIELDS & ANSWERED.keys()


def test_answers_name_keys_that_exist() -> None:
    named = [answer.instead for answer in ANSWERED.values() if answer.instead]
    assert named
    for key in [*named, *TRANSLATED, *ANSWERED_VALUES]:
        assert field_of(tuple(key.split("."))) == tuple(key.split(".")), key

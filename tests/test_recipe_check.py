"""Checking goes on after a mistake: something stands in for whatever must be there."""

from __future__ import annotations

from accel_trainer.draft import ABSENT, Draft, look_up
from accel_trainer.recipe import Recipe
from accel_trainer.recipe_check import _STAND_INS, checked
from accel_trainer.recipe_fields import is_required, sections


def test_everything_required_has_a_stand_in() -> None:
    required = [(*keys, name) for keys, schema in sections().items() for name in schema["properties"] if is_required((*keys, name))]  # fmt: skip
    # The sections of a new model's tokenizer and the like are optional themselves.
    below_optional = [keys for keys in required if not all(is_required(keys[:depth]) for depth in range(1, len(keys)))]
    assert [keys for keys in required if look_up(_STAND_INS, keys, ABSENT) is ABSENT] == below_optional
    Recipe.model_validate(_STAND_INS)


def test_an_empty_draft_lacks_its_sections() -> None:
    draft = Draft("r")
    checked(draft)
    assert [mistake.key for mistake in draft.mistakes] == ["dataset", "model", "training"]
    assert {mistake.what for mistake in draft.mistakes} == {"it is missing"}


def test_rules_are_not_asked_about_what_is_faulty() -> None:
    values = {**_STAND_INS, "training": {"global_batch_size": 1, "learning_rate": 1.0, "max_steps": 10, "warmup_steps": 99}}  # fmt: skip
    draft = Draft("r", values={**values})
    checked(draft)
    assert [mistake.key for mistake in draft.mistakes] == ["training.warmup_steps"]
    draft = Draft("r", values={**values, "training": {**values["training"], "max_steps": -1}})
    checked(draft)
    assert [mistake.key for mistake in draft.mistakes] == ["training.max_steps"]

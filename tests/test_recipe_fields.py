"""The schema's answers about keys agree with the recipe's own classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_origin

from accel_trainer.draft import Keys
from accel_trainer.recipe import Recipe, Section
from accel_trainer.recipe_fields import allowed_at, field_of, is_required, sections


def section_classes(section: type[Section] = Recipe, keys: Keys = ()) -> Iterator[tuple[Keys, type[Section]]]:
    yield keys, section
    for name, info in section.model_fields.items():
        if get_origin(info.annotation) is list:  # of results: no keys of their own in a recipe as people write it
            continue
        for kind in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from section_classes(kind, (*keys, name))


def test_every_section_and_field_is_known() -> None:
    classes = dict(section_classes())
    assert sections().keys() == classes.keys()
    for keys, section in classes.items():
        assert list(sections()[keys]["properties"]) == list(section.model_fields)
        for name, info in section.model_fields.items():
            at = (*keys, name)
            assert allowed_at(at), at
            assert is_required(at) == info.is_required()
            assert field_of(at) == at
            assert field_of((*keys, f"no_{name}")) is None


def test_a_field_holds_all_that_lies_below_it() -> None:
    assert field_of(("dataset", "data_files", "train", 0)) == ("dataset", "data_files")
    assert [schema["type"] for schema in allowed_at(("dataset", "data_files", "train", 0))] == ["string"]
    assert allowed_at(("training", "seed", "x")) == []

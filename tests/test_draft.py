"""Where values stand, and how mistakes in them are told."""

from __future__ import annotations

from accel_trainer.draft import Draft, dotted, shown


def test_keys_and_values_are_shown_in_one_line() -> None:
    assert dotted(("dataset", "data_files", "train", 0)) == "dataset.data_files.train[0]"
    assert dotted(()) == ""
    assert shown("a\n  b") == "a b"
    assert len(shown("x" * 99)) <= 60
    shown("\ud800").encode()


def test_a_value_is_put_below_mappings_alone() -> None:
    draft = Draft("r", values={"a": None, "b": {"c": 1}})
    assert draft.put(("a", "x"), 2) is None
    assert draft.put(("b", "c", "d"), 3) == ("b", "c")
    assert draft.values == {"a": {"x": 2}, "b": {"c": 1}}
    assert draft.get(("b", "c")) == 1
    assert draft.get(("b", "c", "d"), "none") == "none"


def test_a_mistake_stands_where_its_key_or_the_section_around_it_stands() -> None:
    draft = Draft("r")
    draft.place(("a",), 2, "")
    draft.fault(("a", "b"), "it is missing", "add it")
    draft.fault(("c",), "unknown", "remove it", line=5, suspect=("d",))
    assert list(map(str, draft.mistakes)) == ["r:2: a.b: it is missing; add it", "r:5: c: unknown; remove it"]
    assert (draft.faulty, draft.suspects) == ({("a", "b")}, {("d",)})


def test_an_override_has_no_lines_and_is_shown_as_typed() -> None:
    draft = Draft("command line", "a=1")
    draft.place(("a",), 1, "1")
    draft.fault(("a",), "too small", "give 2", line=1)
    assert [str(mistake) for mistake in draft.mistakes] == ["command line: a: too small (in `a=1`); give 2"]


def test_what_moves_keeps_its_place() -> None:
    draft = Draft("r")
    draft.place(("old",), 3, "[x]")
    draft.place(("old", 0), 4, "x")
    draft.move(("old",), ("section", "new"))
    assert {keys: spot.line for keys, spot in draft.spots.items()} == {("section", "new"): 3, ("section", "new", 0): 4}

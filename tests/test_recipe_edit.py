"""Editing a recipe's text: the values are those asked for, and nobody's comment or line is lost."""

from __future__ import annotations

import difflib
import errno
import json
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sample_files import MINIMAL, SCALARS

from accel_trainer import recipe_edit
from accel_trainer.draft import ABSENT, Draft, Keys
from accel_trainer.errors import RecipeError, UserError
from accel_trainer.library import shipped
from accel_trainer.recipe_edit import changing, edit, read_text, write_recipe
from accel_trainer.recipe_file import parse_recipe, read_draft

COMMENTED = """\
# yaml-language-server: $schema=recipe.schema.json
# A header
# of two lines.

description: 'quoted'   # beside text
problem_type: single_label_classification
dataset:                # beside a heading
  # above a key
  path: org/data
  splits: {train: train, validation: "validation"}   # beside braces
  labels:               # beside labels
    # inside labels
    - negative          # beside an item
    - positive
  # text_column: review

  max_length: 32        # beside a number
                        # and below it

model:
    checkpoint: org/model
    sha256:
        config.json: 'aa' # beside a hash
        # between hashes
        "model.safetensors": bb
    # freeze_layers: 2

training:
  # first of all
  global_batch_size: 8
  max_steps:
    10
  learning_rate:   1e-5
  lr_scheduler_kwargs: {
    # inside braces
  }   # behind braces
evaluation:
  # average: micro
saving:
  ? save_strategy
  : epoch
tracking:
  logging_steps: 10
  project_name: |+
    # no comment
    two lines

  # report_to: []
# A footer
"""
TEXTS = {
    "commented": COMMENTED,
    "minimal": MINIMAL,
    "one line of braces": json.dumps(yaml.safe_load(MINIMAL)),
    "braces below ---": f"%YAML 1.2\n--- {json.dumps(yaml.safe_load(MINIMAL), indent=1)} # behind\n",
    "without an end": COMMENTED[: COMMENTED.index("\n  project_name")],
    "other line ends": COMMENTED.replace("\n", "\r\n"),
    "byte order mark": "\ufeff" + COMMENTED,
    "document marks": f"--- # start\n{MINIMAL}... # end\n",
    **{path.stem: path.read_text(encoding="utf-8") for path in sorted(shipped("recipes").glob("*.yaml"))},
}

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [str(text) for text, _ in SCALARS]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words
plain = st.recursive(
    scalars, lambda below: st.lists(below, max_size=3) | st.dictionaries(words, below, max_size=3), max_leaves=6
)
labels = st.lists(words, max_size=3) | st.dictionaries(words, words, max_size=3)
KEYS: dict[Keys, st.SearchStrategy[Any]] = {
    ("description",): scalars,
    ("source",): scalars,
    ("dataset",): st.dictionaries(st.sampled_from(["path", "name", "text_column"]), plain, min_size=1),
    ("dataset", "revision"): scalars,
    ("dataset", "splits", "test"): scalars,
    ("dataset", "labels"): labels,
    ("dataset", "max_length"): plain,
    ("model", "sha256"): st.none() | st.dictionaries(words, words, max_size=3),
    ("model", "sha256", "config.json"): words,
    ("training", "seed"): plain,
    ("training", "max_steps"): scalars,
    ("training", "lr_scheduler_kwargs"): st.dictionaries(words, plain, max_size=3),
    ("evaluation", "average"): scalars,
    ("saving", "save_strategy"): scalars,
    ("tracking", "logging_steps"): scalars,
    ("tracking", "project_name"): words,
    ("results",): st.lists(st.dictionaries(words, plain, max_size=3), max_size=2),
    ("unknown",): plain,
}  # fmt: skip
changes = st.lists(st.sampled_from(list(KEYS)), max_size=4, unique=True).flatmap(
    lambda keys: st.fixed_dictionaries({key: KEYS[key] | st.just(ABSENT) for key in keys})
)


def values_of(text: str) -> dict[str, Any]:
    draft = read_draft(text, "r")
    assert not draft.mistakes, list(map(str, draft.mistakes))
    return draft.values


def comment_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip().startswith("#")]


def changed(values: dict[str, Any], changes: dict[Keys, Any]) -> dict[str, Any]:
    draft = Draft("r", values=deepcopy(values))
    for keys, value in changes.items():
        outer = draft.get(keys[:-1])
        if value is not ABSENT:
            assert draft.put(keys, deepcopy(value)) is None
        elif isinstance(outer, dict):
            outer.pop(keys[-1], None)
    return draft.values


@pytest.mark.parametrize("name", TEXTS)
@settings(max_examples=30)
@given(changes=changes)
@example(changes={("dataset", "labels"): ["\n"]})
def test_exactly_the_changes_are_made(name: str, changes: dict[Keys, Any]) -> None:
    text = TEXTS[name]
    wanted = changed(values_of(text), changes)
    edited = edit(text, changes)
    assert values_of(edited) == wanted
    assert edit(edited, changes) == edited
    assert edited.startswith("\ufeff") == text.startswith("\ufeff")
    assert edited.count("\r\n") == (edited.count("\n") if "\r\n" in text else 0)
    kept = comment_lines(edited)
    assert [line for line in comment_lines(text) if line not in (*kept, "# no comment")] == []


# What people have in their recipes, and what only somebody who looks for a mistake would write.
SNIPPETS = [
    *("# c\n", "\n", "  # deep\n", "\t# tab\n", "---\n", "...\n", "      \n", "\u2028", "\x85", "  seed: 1   # s\n"),
    *("description: >\n  folded\n  # not comment\n\n", "source: |+\n  keep\n\n\n", "source: |\n  clip\n\n\n"),
    *("'description': 'it''s'\n", "? source\n: x\n", "derived_from:\n  - a\n", "results: []\n", 'source: "a\\\n  b"\n'),
    "name_x: {a: 1, # c\n  b: 2}\n",
]
DAMAGE = st.one_of(
    st.tuples(st.just("insert"), st.integers(0, 40), st.sampled_from(SNIPPETS)),
    st.tuples(st.just("delete"), st.integers(0, 40), st.none()),
    st.tuples(st.just("indent"), st.integers(0, 40), st.none()),
)
WHAT_COMMANDS_CHANGE: list[dict[Keys, Any]] = [
    {("results",): ABSENT, ("derived_from",): "x@sha256:1"},
    {
        ("model", "revision"): "a" * 40,
        ("model", "sha256"): {"config.json": "b" * 64},
        ("dataset", "sha256"): {"train": "d"},
    },
    {("results",): [{"date": "2026-01-01", "step": 3, "metrics": {"test": {"accuracy": 0.5}}}]},
    {("training", "seed"): 7, ("training", "learning_rate"): 1e-5},
    {("dataset", "labels"): ["no", "yes", "\u4e2d: #x"]},
    {("dataset", "splits", "train"): ABSENT},
    {("description",): "a # b: c\nline two"},
]


def damaged(text: str, damages: list[tuple[str, int, str | None]]) -> str:
    lines = text.splitlines(keepends=True)
    for kind, place, snippet in damages:
        if kind == "insert":
            lines.insert(place, snippet or "")
        elif place < len(lines):
            lines[place] = "" if kind == "delete" else lines[place].replace(" ", "  ", 1)
    return "".join(lines)


@settings(max_examples=200)
@given(
    text=st.builds(damaged, st.sampled_from([MINIMAL, COMMENTED]), st.lists(DAMAGE, max_size=4)),
    changes=st.sampled_from(WHAT_COMMANDS_CHANGE),
    ends=st.sampled_from(["\n", "\r\n"]),
    is_cut=st.booleans(),
)
@example(
    text="description: a\nsource: |+\n  keep\n\n\nresults: []\n",
    changes=WHAT_COMMANDS_CHANGE[0],
    ends="\n",
    is_cut=False,
)
@example(
    text="source: |+\n  keep\n\n\nresults: []\n\nmodel: {}\n", changes={("results",): ABSENT}, ends="\n", is_cut=False
)
@example(text="source: |+\n  keep\n\n", changes={("results",): [{"step": 1}]}, ends="\r\n", is_cut=False)
@example(text="description: q # b\n", changes={("description",): "a # b: c\nline two"}, ends="\n", is_cut=False)
def test_any_text_is_changed_exactly_or_not_at_all(
    text: str, changes: dict[Keys, Any], ends: str, is_cut: bool
) -> None:
    text = (text.rstrip() if is_cut else text).replace("\n", ends)
    try:
        wanted = changed(values_of(text), changes)
    except (AssertionError, RecipeError):
        with pytest.raises(RecipeError):
            edit(text, changes)
        return
    refused = ""
    try:
        assert values_of(edit(text, changes)) == wanted
    except UserError as error:  # below what is no mapping now, or a block of text that lacks the end of its last line
        refused = str(error)
    assert not refused or "no mapping" in refused or is_cut


SHIPPED = sorted(shipped("recipes").rglob("*.yaml"))
NUMBERS = [
    ("training", "seed"),
    ("training", "learning_rate"),
    ("dataset", "max_length"),
    ("tracking", "logging_steps"),
]


@pytest.mark.parametrize("seed", range(20))
def test_a_value_changes_in_its_line_alone(seed: int) -> None:
    draw = Random(seed)
    text = draw.choice(SHIPPED).read_text(encoding="utf-8")
    draft = read_draft(text, "r")
    chosen = {
        keys: draw.randrange(10, 10**6) for keys in NUMBERS if draft.get(keys) is not None and draw.random() < 0.7
    }
    before, after = text.split("\n"), edit(text, chosen).split("\n")
    assert len(after) == len(before)
    differing = [place for place, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    assert differing == sorted(line - 1 for keys in chosen if (line := draft.spot(keys).line) is not None)
    for place in differing:
        column = before[place].find("  #")
        if column > 0 and len(before[place][:column].rstrip()) + 10 < column:
            assert after[place][column:] == before[place][column:]  # comments stay in their column


def added(text: str, edited: str) -> list[str]:
    """Lines that come and go, with their signs."""
    lines = difflib.ndiff(text.splitlines(), edited.splitlines())
    return [line[0] + line[2:] for line in lines if line[0] in "+-"]


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({("dataset", "name"): "food"}, ["+  name: food"]),
        ({("model", "from_config"): {}}, ["+    from_config: {}"]),
        ({("saving", "save_steps"): 3}, ["+  save_steps: 3"]),
        ({("evaluation", "average"): "micro"}, ["+  average: micro"]),
        ({("dataset", "max_length"): 16}, ["-  max_length: 32        # beside a number", "+  max_length: 16        # beside a number"]),
        ({("dataset", "max_length"): ABSENT}, ["-  max_length: 32        # beside a number"]),
        ({("description",): "quoted"}, []),
        ({("model", "sha256", "config.json"): ABSENT}, ["-        config.json: 'aa' # beside a hash"]),
        ({("source",): "paper"}, ["+source: paper"]),
        ({("training", "max_steps"): 20}, ["-  max_steps:", "-    10", "+  max_steps: 20"]),
        ({("model", "sha256"): {"config.json": "aa", "model.safetensors": "bb"}}, []),
        (
            {("model", "sha256"): {"model.safetensors": "bb", "config.json": "aa"}},
            [
                "-        config.json: 'aa' # beside a hash",
                "-        # between hashes",
                '-        "model.safetensors": bb',
                "+    # beside a hash",
                "+    # between hashes",
                "+      model.safetensors: bb",
                "+      config.json: aa",
            ],
        ),
        (
            {("dataset", "labels"): ["bad", "good"]},
            [
                "-  labels:               # beside labels",
                "-    # inside labels",
                "-    - negative          # beside an item",
                "-    - positive",
                "+  # inside labels",
                "+  # beside an item",
                "+  labels: [bad, good]   # beside labels",
            ],
        ),
    ],
)  # fmt: skip
def test_lines_that_come_and_go(changes: dict[Keys, Any], lines: list[str]) -> None:
    edited = edit(COMMENTED, changes)
    assert sorted(added(COMMENTED, edited)) == sorted(lines)


SPARSE = """\
problem_type: single_label_classification

dataset:
  data_files: a.csv
  splits: {train: train}

saving:
  save_strategy: steps
  save_total_limit: 2
"""


def test_new_keys_stand_where_the_schema_has_them() -> None:
    new = {
        ("results",): [],
        ("saving", "save_steps"): 5,
        ("derived_from",): "x",
        ("dataset", "path"): ".",
        ("source",): "y",
    }
    edited = edit(SPARSE, new)
    assert edited.endswith("\n\nresults: []\n")  # sections stand apart
    values = values_of(edited)
    assert list(values) == ["problem_type", "source", "derived_from", "dataset", "saving", "results"]
    assert list(values["dataset"]) == ["path", "data_files", "splits"]
    assert list(values["saving"]) == ["save_strategy", "save_steps", "save_total_limit"]
    assert edit(edit(SPARSE, {("results",): [{"step": 1}]}), {("results",): ABSENT}) == SPARSE


def test_an_old_name_gives_way() -> None:
    text = "lr: 1e-3\n" + MINIMAL.replace(", learning_rate: 1e-5", "").replace(
        "max_steps", "warmup_ratio: 0.5, max_steps"
    )
    edited = edit(text, {("training", "learning_rate"): 1.0, ("training", "warmup_steps"): 2})
    assert "lr:" not in edited
    assert "warmup_ratio" not in edited
    recipe = parse_recipe(edited, "r")
    assert (recipe.training.learning_rate, recipe.training.warmup_steps) == (1.0, 2)
    assert edit(text, {("training", "seed"): 1}).startswith("lr: 1e-3\n")


@pytest.mark.parametrize("text", ["", "a: [", "- a\n", "a: 1\na: 2\n", "a: &x 1\n"])
def test_what_is_no_recipe_is_not_edited(text: str) -> None:
    with pytest.raises(RecipeError):
        edit(text, {("a",): 1})


def test_nothing_is_set_below_a_value() -> None:
    with pytest.raises(UserError, match=r"training\.seed\.x: nothing can be set below training\.seed"):
        edit(COMMENTED.replace("  # first of all", "  seed: 1"), {("training", "seed", "x"): 1})


def test_files_are_replaced_at_once_and_through_links(tmp_path: Path) -> None:
    path, link = tmp_path / "r.yaml", tmp_path / "link.yaml"
    path.write_bytes(b"a: 1\r\n")
    link.symlink_to(path)
    assert read_text(link) == "a: 1\r\n"
    write_recipe(link, "a: 2\r\n")
    assert path.read_bytes() == b"a: 2\r\n"
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.yaml", "r.yaml"]
    with pytest.raises(UserError, match=r"cannot write .*r\.yaml/x\.yaml: .*accel-trainer copy"):
        write_recipe(path / "x.yaml", "a: 3\n")
    with pytest.raises(UserError, match=r"none\.yaml: it cannot be read"):
        read_text(tmp_path / "none.yaml")


def test_a_text_that_resists_is_left_to_its_author(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("seed: 2\n", "a: [\n"):
        monkeypatch.setattr(recipe_edit._Editor, "rewritten", lambda *_, wrong=wrong: wrong)
        with pytest.raises(UserError, match=r"training\.seed: in this text, nothing can be set .* set it by hand"):
            edit(MINIMAL, {("training", "seed"): 1})


def test_changes_wait_for_each_other_and_leave_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "r.yaml", tmp_path / "link.yaml"
    path.write_text("0", encoding="utf-8")
    link.symlink_to(path)

    def count(name: Path) -> None:
        for _ in range(20):
            with changing(name) as change:
                change.text = str(int(change.text) + 1)

    with ThreadPoolExecutor() as pool:
        list(pool.map(count, [path, link, path, link]))
    assert path.read_text(encoding="utf-8") == "80"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.yaml", "r.yaml"]

    monkeypatch.setattr(recipe_edit, "PATIENCE", 0.0)
    with changing(path), pytest.raises(UserError, match=r"link\.yaml: another command is changing it"), changing(link):
        pass


def test_where_nothing_can_be_locked_it_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: 1\n", encoding="utf-8")
    monkeypatch.setattr(recipe_edit.FileLock, "acquire", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with changing(path) as change:
        change.text = "a: 2\n"
    assert path.read_text(encoding="utf-8") == "a: 2\n"
    monkeypatch.setattr(recipe_edit.FileLock, "acquire", Mock(side_effect=PermissionError(13, "Permission denied")))
    with (
        pytest.raises(UserError, match=r"cannot write .*r\.yaml: Permission denied; .*accel-trainer copy"),
        changing(path),
    ):
        pass


def test_the_installed_library_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accel_trainer.recipe_edit.__file__", str(tmp_path / "recipe_edit.py"))
    with pytest.raises(UserError, match=r"belongs to the installed package, .*accel-trainer copy FROM TO"):
        write_recipe(tmp_path / "recipes" / "r.yaml", "a: 1\n")
    assert not (tmp_path / "recipes").exists()

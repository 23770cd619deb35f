"""Reading recipes: nothing but a Recipe or a RecipeError comes out, every mistake is found, and what is written loads."""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_files import MINIMAL, SCALARS

from accel_trainer import recipe_file
from accel_trainer.draft import Draft
from accel_trainer.errors import Mistake, RecipeError
from accel_trainer.recipe import CURVES, Recipe
from accel_trainer.recipe_file import (
    COMMAND_LINE,
    as_written,
    glance,
    json_schema,
    load_recipe,
    parse_recipe,
    schema_text,
    to_yaml,
)
from accel_trainer.yaml_text import _SYNTAX

BASE = """\
description: a base
# spare top
# spare top 2
dataset:
  path: org/data
  name: null
  splits:
    train: train
    validation: validation
    test: null
  text_column: text
  labels: [a, b]
  max_length: 32
  # spare dataset
model:
  checkpoint: org/model
  hidden_dropout: 0.1
  freeze_embeddings: false
  # spare model
training:
  seed: 1
  global_batch_size: 8
  max_steps: 10
  learning_rate: 1e-5
  lr_scheduler_type: linear
  lr_scheduler_kwargs: {}
  warmup_steps: 0
  optim: adamw_torch
  weight_decay: 0.0
  max_grad_norm: 1.0
  # spare training
evaluation:
  eval_strategy: epoch
  metrics: [accuracy, f1]
  average: macro
  # spare evaluation
saving:
  save_strategy: epoch
  # spare saving
tracking:
  logging_steps: 10
  report_to: []
"""


class Plant(NamedTuple):
    """A mistake put in the place of one line of BASE, and what must be said about it."""

    line: str  # the line of BASE, without its indentation, that it replaces
    written: str
    key: str
    says: str  # part of the mistake, as shown
    looks_at: tuple[str, ...] = ()  # other lines of BASE that the mistake depends on


PLANTS = [
    Plant("learning_rate: 1e-5", "learning_rate: fast", "training.learning_rate", "'fast' is not a number; give a number above 0"),
    Plant("learning_rate: 1e-5", "learning_rate: -1", "training.learning_rate", "-1 is too small"),
    Plant("learning_rate: 1e-5", "learning_rate: '2e-5'", "training.learning_rate", "'2e-5' is not a number; remove the quotes"),
    Plant("learning_rate: 1e-5", "learning_rate: .inf", "training.learning_rate", ".inf is not a finite number"),
    Plant("learning_rate: 1e-5", "learning_rate: 1e999", "training.learning_rate", "1e999 is not a finite number"),
    Plant("learning_rate: 1e-5", "learning_rate: true", "training.learning_rate", "true is not a number"),
    Plant("learning_rate: 1e-5", "learning_rate:", "training.learning_rate", "nothing is not a number"),
    Plant("learning_rate: 1e-5", "learning-rate: 1e-5", "training.learning-rate", "did you mean `learning_rate`?"),
    Plant("max_steps: 10", "max_steps: 2.0", "training.max_steps", "2.0 is not a whole number; write 2"),
    Plant("max_steps: 10", "max_steps: [1]", "training.max_steps", "[1] is not a whole number"),
    Plant("max_steps: 10", "max_stepz: 10", "training.max_stepz", "did you mean `max_steps`?"),
    Plant("global_batch_size: 8", "per_device_train_batch_size: 8", "training.per_device_train_batch_size", "global_batch_size ="),
    Plant("global_batch_size: 8", "# none", "training.global_batch_size", "it is missing; add it: examples per optimizer step"),
    Plant("seed: 1", "seed: -1", "training.seed", "-1 is too small; give a whole number from 0"),
    Plant("optim: adamw_torch", "optim: adamw_tirch", "training.optim", "is no choice; did you mean adamw_torch?"),
    Plant("warmup_steps: 0", "warmup_ratio: 2", "training.warmup_ratio", "2 is no share of the run"),
    Plant("warmup_steps: 0", "warmup_steps: 99", "training.warmup_steps", "longer than max_steps", ("max_steps: 10",)),
    Plant("# spare training", "warmup_ratio: 0.1", "training.warmup_ratio", "the same as training.warmup_steps, in line", ("warmup_steps: 0",)),
    Plant("# spare training", "metrics: [f1]", "training.metrics", "it belongs in `evaluation`"),
    Plant("# spare training", "revision: main", "training.revision", "it belongs in `dataset` or `model`"),
    Plant("# spare training", "qqqq: 1", "training.qqqq", "it takes seed, global_batch_size"),
    Plant("weight_decay: 0.0", "weight_decay: &x 0.1", "training.weight_decay", "&x is an anchor; a recipe is flat"),
    Plant("weight_decay: 0.0", "weight_decay: *x", "training.weight_decay", "*x is an alias; a recipe is flat"),
    Plant("weight_decay: 0.0", "weight_decay: !!float 1", "training.weight_decay", "is a tag; a recipe is flat"),
    Plant("max_grad_norm: 1.0", "max_grad_norm: 0", "training.max_grad_norm", "0 is too small; give a number above 0 or null"),
    Plant("lr_scheduler_kwargs: {}", "lr_scheduler_kwargs: {a: [1]}", "training.lr_scheduler_kwargs.a", "[1] is neither a number nor"),
    Plant("lr_scheduler_type: linear", "lr_scheduler_type: reduce_lr_on_plateau", "training.lr_scheduler_type", "a function of the step"),
    Plant("description: a base", "description: 2024", "description", "2024 is not text; put it in quotes"),
    Plant("# spare top", "learnin_rate: 1", "learnin_rate", "did you mean `training.learning_rate`?", ("learning_rate: 1e-5",)),
    Plant("# spare top", "learning_rate: 1", "learning_rate", "it belongs in `training`", ("learning_rate: 1e-5",)),
    Plant("# spare top", "training.seed: 1", "training.seed", "write `seed` indented below `training`", ("seed: 1",)),
    Plant("# spare top", "problem_type: regression", "problem_type", "regression is not built yet"),
    Plant("# spare top", "1: 2", "", "the key 1 is not text; put it in quotes"),
    Plant("# spare top 2", "? [a]\n: b", "", "a key must be text"),
    Plant("# spare top 2", "<<: {a: b}", "", "<< is a merge key; a recipe is flat"),
    Plant("# spare top 2", "!!str key: b", "", "a key with an anchor or a tag"),
    Plant("# spare dataset", "path: twice", "dataset.path", "`path` stands here and in line 5; keep one"),
    Plant("# spare dataset", "trust_remote_code: true", "dataset.trust_remote_code", "only from the command line"),
    Plant("# spare dataset", "evaluation_strategy: no", "dataset.evaluation_strategy", "write it as `eval_strategy` in `evaluation`", ("eval_strategy: epoch",)),
    Plant("# spare dataset", "data_files: {train: [3]}", "dataset.data_files.train[0]", "3 is not text; put it in quotes"),
    Plant("path: org/data", "path: data/none.csv", "dataset.path", "no such file or folder: 'data/none.csv'; looked in"),
    Plant("name: null", r'name: "\ud800"', "dataset.name", "half a character"),
    Plant("train: train", "train: [1]", "dataset.splits.train", "is neither text nor a whole number nor a number"),
    Plant("train: train", "train: 1.5", "dataset.splits.train", "1.5 is too large"),
    Plant("train: train", "train: 0", "dataset.splits.train", "0 is too small"),
    Plant("test: null", "test: test[0]", "dataset.splits.test", "write it like train[:8000]"),
    Plant("labels: [a, b]", "labels: [a]", "dataset.labels", "fewer than two classes"),
    Plant("labels: [a, b]", "labels: a", "dataset.labels", "'a' is neither a list of text nor a mapping"),
    Plant("labels: [a, b]", "labels: {0: null, 1: b}", "dataset.labels.0", "null is not text"),
    Plant("max_length: 32", "max_length: 2", "dataset.max_length", "2 is too small; give a whole number from 4 or null"),
    Plant("checkpoint: org/model", "checkpoint: ./none", "model.checkpoint", "no such file or folder"),
    Plant("freeze_embeddings: false", "freeze_embeddings: yes", "model.freeze_embeddings", "'yes' is not true or false"),
    Plant("hidden_dropout: 0.1", "hidden_dropout: 1", "model.hidden_dropout", "1 is too large; give a number from 0 and below 1 or null"),
    Plant("# spare model", "train_tokenizer: 3", "model.train_tokenizer", "3 is no section; write its keys below it"),
    Plant("metrics: [accuracy, f1]", "metrics: f1", "evaluation.metrics", "'f1' is not a list of text; write a list: [f1]"),
    Plant("metrics: [accuracy, f1]", "metrics: [f1, 3]", "evaluation.metrics[1]", "3 is not text; put it in quotes"),
    Plant("average: macro", "average: micr", "evaluation.average", "did you mean micro?"),
    Plant("# spare evaluation", "metric_for_best_model: f2", "evaluation.metric_for_best_model", "f2 is not produced", ("metrics: [accuracy, f1]", "validation: validation")),
    Plant("save_strategy: epoch", "save_strategy: best", "saving.save_strategy", "the best weights are kept"),
    Plant("save_strategy: epoch", "save_strategy: steps", "saving.save_steps", "it is missing"),
]  # fmt: skip

# Whole files of which nothing more can be read, and whole sections.
FILES: list[tuple[str | bytes, int | None, str]] = [
    ("", None, "the file is empty"),
    ("# only a comment\n", None, "the file is empty"),
    ("~\n", None, "the file is empty"),
    ("- a\n", None, "this is no recipe"),
    ("text\n", None, "this is no recipe"),
    ("use_cpu: true\nnum_processes: 2\n", None, "this is an accelerate config, no recipe; give it by --config_file"),
    (b"a: 1\n\xff\xfe", 2, "not UTF-8"),
    (" " * 1_000_001, None, "over 1 MB"),
    ("[" * 5000, 1, "levels deep"),
    ("a:\n  b: [" + "1," * 30_000 + "]\n", 2, "more than 20000 values"),
    (MINIMAL + "---\na: 1\n", 4, "a second document"),
    ("a:\n\tb: 1\n", 2, "a tab stands here; indent with spaces"),
    ("a: `b`\n", 1, "text cannot start with `"),
    ("a:\n  b: *.csv\n", 2, "text cannot start with * or &"),
    ("a: b: c\n", 1, "a ': ' stands where none can"),
    ("a: 1\nb\nc: 2\n", 3, "a key without ': '"),
    ("a:\n  - b\n  c: 1\n", 3, "does not fit"),
    ("a: [b\nc: d\n", 2, "a bracket is not closed"),
    ("a: {b: train[:9]}\n", 1, "a bracket is not closed"),
    ("a: ]\n", 1, "a value is missing"),
    ("a: 'b\n", 2, "a quote is not closed"),
    ('a: "C:\\data"\n', 1, "\\ starts an escape in double quotes"),
    ('a: "\\UFFFFFFFF"\n', None, "\\ starts an escape in double quotes"),
    ("a: 1\nb: \x00\n", 2, "a control character"),
    ("%YAML 3.0\n---\na: 1\n", 1, "cannot be read as YAML"),
    (MINIMAL.replace("training", "trainng"), 3, "did you mean `training`?"),
    (MINIMAL.replace("model: {checkpoint: org/model}", ""), None, "model: it is missing"),
    (MINIMAL.replace("model: {checkpoint: org/model}", "model: 3"), 2, "3 is no section"),
    (MINIMAL.replace("{train: train, validation: validation}", ""), 1, "dataset.splits.train: it is missing"),
    (MINIMAL.replace("org/model", "a, revision: b, freeze_layers: " + "9" * 500), 2, "is not a whole number"),
    (MINIMAL.replace("1e-5", "1" + "0" * 350), 3, "is not a finite number"),
]

OVERRIDES = [
    ("a." * 25 + "b=1", "", "a key of 26 parts"),
    ("dataset.path=https://ann:hunter2@host/a.csv", "dataset.path", "there is a token or a password in it"),
    ("training.seed", "", "an override has no ="),
    (
        "training.num_train_epochs=2",
        "training.num_train_epochs",
        "it has no effect: max_steps wins, 10 in line 3 (in `training.num_train_epochs=2`); add training.max_steps=null",
    ),
    ("=3", "", "an override needs a key"),
    ("training..seed=3", "", "an override needs a key"),
    ("trainng.seed=3", "trainng", "did you mean `training`?"),
    ("training.sed=3", "training.sed", "did you mean `seed`?"),
    ("seed=3", "seed", "write training.seed=3"),
    ("training.seed.x=3", "training.seed.x", "training.seed holds one value"),
    ("training.seed=fast", "training.seed", "'fast' is not a whole number"),
    ("training.learning_rate=", "training.learning_rate", "nothing is not a number"),
    ("dataset.labels=[a", "dataset.labels", "a bracket is not closed"),
    ("dataset.labels={a: b, a: c}", "dataset.labels.a", "given twice"),
    ("dataset.data_files.train=x.csv", "dataset.data_files.train", "no such file or folder"),
]


def mistakes_of(text: str | bytes, overrides: tuple[str, ...] = ()) -> tuple[Mistake, ...]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml", overrides)
    return caught.value.mistakes


def planted(plants: list[Plant]) -> tuple[str, dict[Plant, int]]:
    """BASE with mistakes in it, and the line at which each must be reported."""
    lines, reported = [], {}
    by_line = {plant.line: plant for plant in plants}
    for line in BASE.splitlines():
        plant = by_line.pop(line.strip(), None)
        if plant is not None:
            reported[plant] = len(lines) + 1
            indent = line[: len(line) - len(line.lstrip())]
            line = "\n".join(indent + part for part in plant.written.split("\n"))
        lines += line.split("\n")
    assert not by_line
    for plant, key in [(plant, plant.key.rpartition(".")[0]) for plant in plants if "it is missing" in plant.says]:
        reported[plant] = lines.index(f"{key}:") + 1
    return "\n".join(lines) + "\n", reported


def check_planted(plants: list[Plant]) -> None:
    text, lines = planted(plants)
    found = mistakes_of(text)
    assert [mistake.line for mistake in found] == sorted(mistake.line or 0 for mistake in found)
    left = list(found)
    for plant in plants:
        hits = [
            mistake
            for mistake in left
            if mistake.key == plant.key and plant.says in str(mistake) and mistake.line == lines[plant]
        ]
        assert hits, (plant, list(map(str, left)))
        left.remove(hits[0])
    assert not left, list(map(str, left))


def test_the_base_has_no_mistakes() -> None:
    parse_recipe(BASE, "r.yaml")


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.written)
def test_one_planted_mistake_is_found_alone(plant: Plant) -> None:
    check_planted([plant])


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(2, 40))
def test_mistakes_planted_together_are_all_found(seed: int, n: int) -> None:
    chosen: list[Plant] = []
    taken: set[str] = set()
    for plant in Random(seed).sample(PLANTS, n):
        if not taken & {plant.line, *plant.looks_at}:
            chosen.append(plant)
            taken |= {plant.line, *plant.looks_at}
    if "<<: {a: b}" in [plant.written for plant in chosen]:
        chosen = [plant for plant in chosen if not plant.written.startswith("1:")]
    # A line that holds two lines would move the one that a duplicate names.
    if any(plant.written.startswith("? ") for plant in chosen):
        chosen = [plant for plant in chosen if "in line 5" not in plant.says]
    check_planted(chosen)


@pytest.mark.parametrize(("text", "line", "says"), FILES, ids=lambda part: str(part)[:30])
def test_a_whole_file_is_refused(text: str | bytes, line: int | None, says: str) -> None:
    found = mistakes_of(text)
    assert len(found) == 1, list(map(str, found))
    assert says in str(found[0])
    assert found[0].line == line
    assert found[0].remedy


@pytest.mark.parametrize(("override", "key", "says"), OVERRIDES)
def test_an_override_is_refused_as_typed(override: str, key: str, says: str) -> None:
    (mistake,) = mistakes_of(MINIMAL.replace("path: org/data, ", "data_files: {validation: hf://x}, "), (override,))
    assert (mistake.source, mistake.line, mistake.key) == (COMMAND_LINE, None, key)
    assert says in str(mistake)
    assert f"`{override}`" in mistake.what


def test_nothing_is_set_below_a_value_of_the_file() -> None:
    text = MINIMAL.replace("path: org/data", "data_files: hf://x.csv")
    (mistake,) = mistakes_of(text, ("dataset.data_files.train=x.csv",))
    assert "nothing can be set below dataset.data_files, which is hf://x.csv" in mistake.what


def fault_calls() -> Iterator[tuple[str, int, int]]:
    beyond = {"accelerate_config.py", "on_disk.py", "checking.py"}  # what is no part of reading: test_checking has all
    for module in (path for path in Path(recipe_file.__file__).parent.glob("*.py") if path.name not in beyond):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "fault":
                yield module.name, node.lineno, node.end_lineno or node.lineno


def test_the_tables_above_hold_every_kind_of_mistake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: set[tuple[str, int]] = set()
    fault = Draft.fault

    def recording(self: Draft, *args: Any, **kwargs: Any) -> None:
        frame = sys._getframe(1)
        seen.add((Path(frame.f_code.co_filename).name, frame.f_lineno))
        fault(self, *args, **kwargs)

    monkeypatch.setattr(Draft, "fault", recording)
    for plant in PLANTS:
        check_planted([plant])
    found = [mistake for text, _, _ in FILES for mistake in mistakes_of(text)]
    for override, _, _ in OVERRIDES:
        mistakes_of(MINIMAL, (override,)) if "data_files" not in override else None
    test_nothing_is_set_below_a_value_of_the_file()
    for path in (tmp_path, tmp_path / "none.yaml", tmp_path / "null\0", tmp_path / "reviews.csv.gz"):
        with pytest.raises(RecipeError):
            load_recipe(path)
    calls = list(fault_calls())
    assert calls
    missed = [
        (name, first) for name, first, last in calls if not any((name, n) in seen for n in range(first, last + 1))
    ]
    assert not missed, missed
    for _, what, _ in _SYNTAX:
        assert any(what.split("{")[0] in mistake.what for mistake in found), what


# --- nothing else comes out -------------------------------------------------------------------------------------------


def reads_or_refuses(text: str | bytes, overrides: tuple[str, ...] = ()) -> None:
    try:
        recipe = parse_recipe(text, "r.yaml", overrides)
    except RecipeError as error:
        message = str(error)
    else:
        message = to_yaml(recipe)
    message.encode()
    for jargon in ("Input should", "extra_forbidden", "constrained", "pydantic", "Section"):
        assert jargon not in message or jargon in str(text) + str(overrides)


YAML_PIECES = st.lists(
    st.sampled_from([*":-[]{}?&*!|>%@`'\"#,~<", "\n", "\n  ", " ", "\t", ": ", "a", "1", "dataset", "\\", "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "---", "...", "<<"])
).map("".join)  # fmt: skip


@settings(max_examples=300)
@given(st.one_of(st.text(), st.binary(), YAML_PIECES))
def test_any_text_is_read_or_refused(text: str | bytes) -> None:
    reads_or_refuses(text)


@settings(max_examples=150)
@given(st.data())
def test_a_mangled_recipe_is_read_or_refused(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([BASE, MINIMAL]))
    start = data.draw(st.integers(0, len(text)))
    stop = min(len(text), start + data.draw(st.integers(0, 12)))
    reads_or_refuses(text[:start] + data.draw(YAML_PIECES | st.text(max_size=5)) + text[stop:])


KEYS = ["training.seed", "dataset", "dataset.labels", "dataset.data_files", "dataset.splits.train", "model.from_config.a", "x", "lr"]  # fmt: skip


@settings(max_examples=150)
@given(st.one_of(st.text(), st.builds(lambda key, value: f"{key}={value}", st.sampled_from(KEYS), YAML_PIECES)))
def test_any_override_is_applied_or_refused(override: str) -> None:
    reads_or_refuses(MINIMAL, (override,))


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("training.learning_rate=2e-5", "training", "learning_rate", 2e-5),
        ("training.learning_rate = 1", "training", "learning_rate", 1.0),
        ("dataset.labels=[a, b]", "dataset", "labels", ["a", "b"]),
        ("dataset.labels=[no, yes]", "dataset", "labels", ["no", "yes"]),
        ("dataset.labels=[0, 1]", "dataset", "labels", ["0", "1"]),
        ("dataset.labels={neg: NEGATIVE, pos: POSITIVE}", "dataset", "labels", {"neg": "NEGATIVE", "pos": "POSITIVE"}),
        ("dataset.labels={0: bad, true: good}", "dataset", "labels", {"0": "bad", "true": "good"}),
        ("dataset.name=null", "dataset", "name", None),
        ("dataset.name=", "dataset", "name", None),
        ("dataset.name='null'", "dataset", "name", "null"),
        ("dataset.text_column=a: b # c", "dataset", "text_column", "a: b # c"),
        ("dataset.text_column=a=b", "dataset", "text_column", "a=b"),
        ("evaluation={}", "evaluation", "average", "macro"),
    ],
)
def test_overrides(override: str, section: str, name: str, value: object) -> None:
    recipe = parse_recipe(MINIMAL + "evaluation: {average: micro}\n", "r", [override])
    assert getattr(getattr(recipe, section), name) == value


@pytest.mark.parametrize("rows", ["train[:8000]", "train[80%:]", "train[:9] + extra"])
def test_a_slice_is_text(rows: str) -> None:
    assert parse_recipe(MINIMAL, "r", [f"dataset.splits.train={rows}"]).dataset.splits.train == rows


def test_the_last_override_wins_and_old_names_give_way_to_it() -> None:
    text = MINIMAL.replace("max_steps", "warmup_ratio: 0.1, max_steps")
    recipe = parse_recipe(text, "r", ["training.warmup_steps=2", "training.warmup_steps=3"])
    assert recipe.training.warmup_steps == 3


def test_a_heading_without_keys_says_nothing() -> None:
    assert parse_recipe(MINIMAL + "evaluation:\n  # average: micro\n", "r") == parse_recipe(MINIMAL, "r")


def test_a_byte_order_mark_is_no_matter() -> None:
    assert parse_recipe(b"\xef\xbb\xbf" + MINIMAL.encode(), "r") == parse_recipe("\ufeff" + MINIMAL, "r")


# --- writing ----------------------------------------------------------------------------------------------------------

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    [str(text) for text, _ in SCALARS]
)
names = words.filter(bool)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words
plain = st.recursive(scalars, lambda below: st.lists(below, max_size=3) | st.dictionaries(words, below, max_size=3), max_leaves=6)  # fmt: skip
rates = st.floats(1e-12, 1e12)


results = st.fixed_dictionaries(
    {
        "date": st.dates().map(str),
        "step": st.integers(0, 10**9),
        "metrics": st.dictionaries(words, st.dictionaries(words, st.floats(-1, 1), max_size=2), max_size=2),
        "hardware": words,
        "versions": st.dictionaries(words, words, max_size=2),
    },
    optional={"tolerance": st.floats(0, 1), "duration": st.none() | rates},
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    new = draw(st.booleans())
    values: dict[str, Any] = {
        "description": draw(words),
        "source": draw(st.none() | words),
        "derived_from": draw(st.none() | words),
        "results": draw(st.lists(results, max_size=2)),
        "dataset": {
            "path": "org/data",
            "name": draw(st.none() | words),
            "data_files": draw(st.none() | words | st.lists(words, max_size=3) | st.dictionaries(words, words, max_size=3)),
            "splits": {"train": draw(st.sampled_from(["train[:80%]", "a+b[-9:]"])), "validation": "no"},
            "text_column": draw(words.filter(lambda word: word != "pair")),
            "text_pair_column": "pair",
            "labels": draw(st.none() | st.lists(names, min_size=2, max_size=4, unique=True)),
            "sha256": draw(st.none() | st.dictionaries(words, words, max_size=2)),
        },
        "model": {"tokenizer": "org/t", "from_config": {**draw(st.dictionaries(words, plain, max_size=3)), "model_type": "bert"}}
        if new
        else {"checkpoint": "org/model", "hidden_dropout": draw(st.none() | st.floats(0, 0.99))},
        "training": {
            "seed": draw(st.integers(0, 2**63 - 1)),
            "global_batch_size": draw(st.integers(1, 10**9)),
            "num_train_epochs": draw(rates),
            "learning_rate": draw(rates),
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": draw(st.fixed_dictionaries({"num_decay_steps": st.integers(0, 10**6)}, optional={"decay_type": st.sampled_from(CURVES)})),
            "warmup_steps": draw(st.floats(0, 0.99) | st.integers(0, 99)),
        },
        "tracking": {"project_name": draw(words), "report_to": draw(st.lists(st.sampled_from(["tensorboard", "mlflow", "wandb"])))},
    }  # fmt: skip
    return Recipe.model_validate(values)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(recipes(), words)
def test_what_is_written_loads_back(recipe: Recipe, header: str) -> None:
    text = to_yaml(recipe, "".join(character for character in header if character.isprintable()))
    assert parse_recipe(text.encode(), "r") == recipe
    assert list(yaml.safe_load(text)) == [name for name, value in recipe if value not in (None, [])]
    assert yaml.safe_load(text)["training"]["learning_rate"] == recipe.training.learning_rate


def test_what_is_written_reads_well() -> None:
    recipe = parse_recipe(MINIMAL, "r", ["dataset.labels=[no, 好, '010', 1_000, 2e-5]", "training.learning_rate=2e-5"])
    text = to_yaml(recipe, "First line.\n\nLast line.")
    assert text.startswith("# First line.\n#\n# Last line.\ndescription: ''\nproblem_type: ")
    assert "\n\ndataset:\n  path: org/data\n" in text
    assert "  labels: ['no', 好, '010', '1_000', '2e-5']\n" in text
    assert "  learning_rate: 2.0e-05\n" in text


def test_the_shipped_schema_is_up_to_date() -> None:
    shipped = Path(recipe_file.__file__).with_name("recipe.schema.json").read_text(encoding="utf-8")
    assert shipped == schema_text(), "run python scripts/write_schema.py"
    assert json.loads(shipped) == json_schema()


# --- the file itself --------------------------------------------------------------------------------------------------


def test_a_missing_recipe_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(RecipeError, match=r"there is no such file; its folder has recipe\.yaml"):
        load_recipe(tmp_path / "recpe.yaml")
    with pytest.raises(RecipeError, match="there is no folder"):
        load_recipe(tmp_path / "none" / "recipe.yaml")
    with pytest.raises(RecipeError, match="this is a folder"):
        load_recipe(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_recipe_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "secret.yaml"
    path.touch(0o000)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(path)


def test_as_written_nothing_is_looked_for(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(MINIMAL.replace("path: org/data", "data_files: [gone.csv, 'x/*.csv']"), encoding="utf-8")
    assert as_written(path).dataset.data_files == ["gone.csv", "x/*.csv"]
    assert glance(path) == (as_written(path), False)
    (tmp_path / "gone.csv").touch()
    assert glance(path) == (as_written(path), True)


@pytest.mark.parametrize("read", [load_recipe, as_written, glance])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MINIMAL.replace("org/data", "https://ann:geheim1234@host/x.csv"), "a token or a password"),
        (MINIMAL + "#" * 1_000_000, "over 1 MB"),
        (MINIMAL + "extra: 1\n", "extra"),
        (None, "no such file"),
    ],
)
def test_every_reader_of_a_file_has_the_same_checks(
    tmp_path: Path, read: Callable[[Path], object], text: str | None, says: str
) -> None:
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=says) as caught:
        read(path)
    assert "geheim" not in str(caught.value)


def test_the_source_is_the_path_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("training: 1\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe("./r.yaml")
    assert {mistake.source for mistake in caught.value.mistakes} == {"./r.yaml"}

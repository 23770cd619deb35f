"""What a recipe names is checked as a whole before anything is computed, and is the same on every process."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import alone_on_the_cpu, write_recipe_in

from accel_trainer import collectives
from accel_trainer import inputs as module
from accel_trainer.differences import differences
from accel_trainer.errors import UserError
from accel_trainer.hardware import start_accelerator
from accel_trainer.inputs import Inputs, check_metrics, mathematics, read_inputs, read_inputs_together
from accel_trainer.recipe import Recipe
from accel_trainer.recipe_file import load_recipe


@pytest.fixture(autouse=True)
def no_launch(tmp_path: Path) -> Iterator[None]:
    with alone_on_the_cpu(tmp_path / "cache"):
        yield


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(write_recipe_in(tmp_path))


def with_config(inputs: Inputs, **entries: Any) -> Inputs:
    model: Any = copy.copy(inputs.model)
    model.config = copy.deepcopy(inputs.model.config)
    for name, value in entries.items():
        setattr(model.config, name, value)
    return dataclasses.replace(inputs, model=model)


def changes(one: Inputs, other: Inputs) -> list[str]:
    return [key for key, _, _ in differences(mathematics(one), mathematics(other))]


def test_the_config_is_mathematics(recipe: Recipe) -> None:
    inputs = read_inputs(recipe)
    assert changes(inputs, read_inputs(recipe)) == []
    for entry, value in (("layer_norm_eps", 0.5), ("hidden_act", "relu"), ("attention_probs_dropout_prob", 0.3)):
        assert changes(inputs, with_config(inputs, **{entry: value})) == [f"config.{entry}"]
    assert changes(inputs, with_config(inputs, architectures=["X"], transformers_version="9", _name_or_path="/x")) == []


@pytest.mark.parametrize("differs", ["weights", "config", "labels", None])
def test_processes_compare_what_they_read(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, differs: str | None) -> None:
    """The other process reads what this one does, but for one thing."""
    first: list[Any] = []
    accelerator, read = start_accelerator(), read_inputs
    monkeypatch.setattr(collectives, "from_main_process", lambda _, own: first.append(own) or own)
    read_inputs_together(accelerator, recipe)

    def other(*arguments: Any, **keywords: Any) -> Inputs:
        inputs = read(*arguments, **keywords)
        if differs == "weights":
            return dataclasses.replace(inputs, initial_sha256="0" * 64)
        if differs == "config":
            return with_config(inputs, layer_norm_eps=0.5)
        if differs == "labels":
            return dataclasses.replace(inputs, label_names=["positive", "negative"])
        return inputs

    monkeypatch.setattr(module, "read_inputs", other)
    given = iter(first)
    monkeypatch.setattr(collectives, "from_main_process", lambda *_: next(given))
    if differs is None:
        read_inputs_together(accelerator, recipe)
        assert next(given, None) is None
    else:
        told = {
            "weights": "initial weights: [0-9a-f]{12}… on process 0, 000000000000… on process 0",
            "config": r"config\.layer_norm_eps: 1e-12 on process 0, 0\.5 on process 0",
            "labels": r"labels: \[negative, positive\] on process 0, \[positive, negative\] on process 0",
        }[differs]
        with pytest.raises(UserError, match=rf"the processes read different data or made .*torch .*:\n  {told}$"):
            read_inputs_together(accelerator, recipe)


def test_processes_compare_their_recipes_before_they_read(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files may lie elsewhere; a key that is no mathematics would let one evaluate alone."""
    accelerator = start_accelerator()
    other = load_recipe(write_recipe_in(tmp_path / "elsewhere", evaluation={"eval_strategy": "steps", "eval_steps": 7}))
    monkeypatch.setattr(collectives, "from_main_process", lambda *_: module.without_places(other))
    monkeypatch.setattr(module, "read_inputs", None)
    said = r"given different recipes; give every machine the same one:\n.*  evaluation\.eval_steps: 7 on process 0, null on"
    with pytest.raises(UserError, match=f"(?s){said}") as caught:
        read_inputs_together(accelerator, recipe)
    assert "dataset.path" not in str(caught.value)


def test_a_tokenizer_larger_than_the_embeddings(tmp_path: Path) -> None:
    small = read_inputs(load_recipe(write_recipe_in(tmp_path)))
    small.model.save_pretrained(tmp_path / "small")
    config = {"from_config": None, "train_tokenizer": None, "checkpoint": str(tmp_path / "small")}
    small.tokenizer.save_pretrained(tmp_path / "fits")
    read_inputs(load_recipe(write_recipe_in(tmp_path, model={**config, "tokenizer": str(tmp_path / "fits")})))
    small.tokenizer.add_tokens(["one", "more"])
    small.tokenizer.save_pretrained(tmp_path / "large")
    n = small.model.config.vocab_size
    with pytest.raises(UserError, match=rf"model\.tokenizer: it has {n + 2} tokens, .* embeddings for {n}; use the"):
        read_inputs(load_recipe(write_recipe_in(tmp_path, model={**config, "tokenizer": str(tmp_path / "large")})))


class TwoNumbers:
    """Stands for a metric of the Hub that produces several numbers."""

    def compute(self, **_: Any) -> dict[str, float]:
        return {"f1": 0.5, "spread": 0.25}


def test_the_best_of_a_foreign_metric_is_one_of_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recipe_for(best: str) -> Recipe:
        return load_recipe(
            write_recipe_in(tmp_path, evaluation={"metrics": ["foreign"], "metric_for_best_model": best})
        )

    loaded: dict[str, Any] = {"foreign": TwoNumbers()}
    check_metrics(recipe_for("foreign_f1"), loaded, 2)
    check_metrics(recipe_for("loss"), loaded, 2)
    with pytest.raises(
        UserError,
        match=r"metric_for_best_model: foreign_f2 is not among the numbers .*loss, foreign_f1, foreign_spread",
    ):
        check_metrics(recipe_for("foreign_f2"), loaded, 2)
    monkeypatch.setattr(module.metrics, "load_metrics", lambda *_, **__: loaded)
    with pytest.raises(UserError, match="foreign_f2"):
        read_inputs(recipe_for("foreign_f2"))

"""Training as a whole: the steps are the recipe's, however they are cut up, interrupted and gone on with."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from harness import (
    NO_DROPOUT,
    OneOfMany,
    Outcome,
    alone_on_the_cpu,
    python,
    run_trainer,
    signal_at,
    start,
    write_recipe_in,
)
from safetensors.torch import load_file
from support import reviews, write_csv

from accel_trainer import dropout, finishing, opening, order, scoring
from accel_trainer.classifier import Classifier

FIVE_STEPS = {"global_batch_size": 16, "max_steps": 5, "num_train_epochs": None}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def whole(place: Path) -> Outcome:
    """A run with dropout, a checkpoint and an evaluation at every step, and a ragged last batch (60 = 7 · 8 + 4)."""
    recipe = write_recipe_in(
        place,
        "whole.yaml",
        evaluation={"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "f1"},
        saving={"save_strategy": "steps", "save_steps": 1},
    )
    outcome = run_trainer(recipe, place / "whole")
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.fixture(scope="module")
def plain(place: Path) -> Outcome:
    """A run without dropout."""
    outcome = run_trainer(write_recipe_in(place, "plain.yaml", model=NO_DROPOUT), place / "plain")
    assert outcome.code == 0, outcome.err
    return outcome


def same_weights(one: Outcome, other: Outcome) -> bool:
    return one.weights_sha256 == other.weights_sha256


# --- what a run leaves


def test_a_run_leaves_every_file(whole: Outcome) -> None:
    assert {path.name for path in whole.folder.iterdir()} == {
        "recipe.yaml",
        "run.json",
        "status.json",
        "metrics.jsonl",
        "results.json",
        "checkpoints",
        "best",
        "model",
        "predictions",
        ".lock",
    }
    assert whole.checkpoints() == [f"checkpoint-{step}" for step in range(1, 9)]
    assert {path.name for path in (whole.folder / "predictions").iterdir()} == {"validation.jsonl", "test.jsonl"}
    assert {path.name for path in (whole.folder / "checkpoints" / "checkpoint-8").iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "trainer_state.json",
        "manifest.json",
    }
    assert list(whole.folder.rglob(".*")) == [whole.folder / ".lock"]


def test_status_is_done(whole: Outcome) -> None:
    assert whole.json("status.json") == {"state": "done", "exit_code": 0, "step": 8, "reason": None}


def test_metrics_lines(whole: Outcome) -> None:
    assert [line["step"] for line in whole.steps] == list(range(1, 9))
    assert [line["step"] for line in whole.evaluations] == list(range(1, 9))
    for line in whole.steps:
        assert set(line) == {"step", "epoch", "loss", "grad_norm", "learning_rate", "tokens"}
        assert math.isfinite(line["loss"])
        assert line["grad_norm"] > 0
    for line in whole.evaluations:
        assert set(line) == {"step", "split", "loss", "accuracy", "f1"}
        assert line["split"] == "validation"
    assert whole.steps[0]["epoch"] == pytest.approx(8 / 60, abs=1e-6)
    assert whole.steps[-1]["epoch"] == 1.0
    assert whole.steps[-1]["tokens"] == whole.json("run.json")["dataset"]["train"]["tokens"]
    rates = [line["learning_rate"] for line in whole.steps]
    assert rates == pytest.approx([1e-3 * (8 - k) / 8 for k in range(8)])


def test_results(whole: Outcome) -> None:
    results = whole.json("results.json")
    assert set(results) == {"train", "validation", "test"}
    assert {
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
        "train_tokens_per_second",
        "steps",
        "padding_avoided",
    } <= set(results["train"])
    assert results["train"]["steps"] == 8
    assert results["train"]["examples"] == 60
    assert 0 <= results["train"]["padding_avoided"] < 1
    for split, rows in (("validation", 20), ("test", 10)):
        assert {"loss", "accuracy", "f1", "per_class", "averages", "confusion_matrix"} <= set(results[split])
        assert np.sum(results[split]["confusion_matrix"]) == rows


def test_results_are_those_of_the_predictions(whole: Outcome) -> None:
    """Scored again from the files alone, by arithmetic of this test."""
    for split in ("validation", "test"):
        text = (whole.folder / "predictions" / f"{split}.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        assert [row["row"] for row in rows] == list(range(len(rows)))
        scores = whole.json("results.json")[split]
        assert scores["accuracy"] == pytest.approx(np.mean([row["prediction"] == row["label"] for row in rows]))
        loss = -np.mean([math.log(row["probabilities"][row["label"]]) for row in rows])
        assert scores["loss"] == pytest.approx(loss, abs=1e-6)
        for row in rows:
            assert sum(row["probabilities"].values()) == pytest.approx(1)
            assert row["prediction"] == max(row["probabilities"], key=row["probabilities"].__getitem__)


def test_run_json(whole: Outcome) -> None:
    facts = whole.json("run.json")
    assert facts["parameters"]["trainable"] == facts["parameters"]["total"]
    assert facts["parameters"]["total"] == sum(tensor.numel() for tensor in whole.weights.values())
    assert facts["plan"]["total_steps"] == 8
    assert facts["labels"] == ["negative", "positive"]
    assert {role: data["rows"] for role, data in facts["dataset"].items()} == {
        "train": 60,
        "validation": 20,
        "test": 10,
    }
    assert facts["hardware"]["num_processes"] == 1
    assert len(facts["initial_weights_sha256"]) == 64


def test_the_best_weights_are_kept(whole: Outcome) -> None:
    """The best evaluation by this test's own reading of metrics.jsonl is what model/ holds."""
    best = max(whole.evaluations, key=lambda line: (line["f1"], -line["step"]))
    results = whole.json("results.json")
    assert (results["train"]["best_step"], results["train"]["best_metric"]) == (best["step"], best["f1"])
    assert results["validation"]["f1"] == best["f1"]
    saved = load_file(whole.folder / "checkpoints" / f"checkpoint-{best['step']}" / "model.safetensors")
    for folder in ("best", "model"):
        weights = load_file(whole.folder / folder / "model.safetensors")
        assert all(torch.equal(saved[name], weight) for name, weight in weights.items())


def test_the_lowest_loss_is_best_by_default(place: Path) -> None:
    """With a rate that makes things worse after a while, so that first, last and best differ."""
    recipe = write_recipe_in(
        place,
        "worse.yaml",
        training={"learning_rate": 0.05, "lr_scheduler_type": "constant", "num_train_epochs": 2},
        evaluation={"eval_strategy": "steps", "eval_steps": 2, "metrics": ["accuracy"]},
        saving={"save_strategy": "no"},
    )
    outcome = run_trainer(recipe, place / "worse")
    losses = {line["step"]: line["loss"] for line in outcome.evaluations}
    best = min(losses, key=losses.__getitem__)
    assert best != max(losses, key=losses.__getitem__)
    assert best != max(losses)
    assert outcome.json("results.json")["train"]["best_step"] == best
    assert outcome.json("results.json")["validation"]["loss"] == losses[best]
    assert not (outcome.folder / "checkpoints").exists()
    assert list(outcome.folder.rglob(".*")) == [outcome.folder / ".lock"]

    last = run_trainer(recipe, place / "last", "saving.load_best_model_at_end=false")
    assert last.json("results.json")["validation"]["loss"] == losses[max(losses)] != losses[best]


def test_the_model_serves_a_pipeline(whole: Outcome, place: Path) -> None:
    from transformers import pipeline

    from accel_trainer.predict import load_predictor, predict_texts

    texts = [text for text, _ in reviews(7, seed=5)]
    classify = pipeline("text-classification", str(whole.folder / "model"), device="cpu")
    theirs = [{s["label"]: s["score"] for s in scores} for scores in classify(texts, top_k=None, truncation=True)]
    with alone_on_the_cpu(place / "cache"):
        ours = [record["probabilities"] for record in predict_texts(load_predictor(str(whole.folder)), texts)]
    assert set(theirs[0]) == {"negative", "positive"}
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


# --- exactly the recipe's steps


def inputs_of(recipe: Path, place: Path) -> Any:
    from accel_trainer.inputs import read_inputs
    from accel_trainer.recipe_file import load_recipe

    with alone_on_the_cpu(place / "datasets-cache"):
        return read_inputs(load_recipe(recipe))


@pytest.mark.parametrize("max_tokens", [1, 48, 100_000])
def test_steps_are_those_of_a_plain_loop(place: Path, max_tokens: int) -> None:
    """Five steps against a loop of torch's own parts: the whole global batch at once, AdamW, clipping, the schedule."""
    recipe = write_recipe_in(
        place,
        "reference.yaml",
        model={**NO_DROPOUT, "classifier_dropout": 0.0},
        training={
            **FIVE_STEPS,
            "learning_rate": 0.01,
            "weight_decay": 0.5,
            "warmup_steps": 2,
            "max_grad_norm": 0.3,
            "label_smoothing_factor": 0.1,
        },
    )
    outcome = run_trainer(recipe, place / f"reference-{max_tokens}", "--max_tokens_per_device", str(max_tokens))
    assert outcome.code == 0, outcome.err

    inputs = inputs_of(recipe, place)
    model, split = inputs.model.train(), inputs.splits["train"]
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}], lr=0.01
    )
    expected = []
    for step in range(5):
        rows = order.global_batch(step, seed=42, num_examples=60, global_batch_size=16)
        assert len(rows) == (12 if step == 3 else 16)
        rate = 0.01 * (step / 2 if step < 2 else (5 - step) / 3)
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(**split.tokens.inputs(rows)).logits
        labels = torch.from_numpy(split.rows.labels[rows])
        loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        expected.append((loss.item(), norm.item(), rate))
    assert any(norm > 0.3 for _, norm, _ in expected)
    found = [(line["loss"], line["grad_norm"], line["learning_rate"]) for line in outcome.steps]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_dropout_is_that_of_seed_step_and_row(place: Path) -> None:
    """At a rate of next to nothing, every step over all rows would have the same loss, but for what is dropped."""
    recipe = write_recipe_in(
        place,
        "dropped.yaml",
        training={"global_batch_size": 60, "num_train_epochs": 4, "learning_rate": 1e-30},
        evaluation={"eval_strategy": "no"},
        saving={"load_best_model_at_end": False},
    )
    outcome = run_trainer(recipe, place / "dropped", "--max_tokens_per_device", "100")
    inputs = inputs_of(recipe, place)
    classifier, split, rows = Classifier(inputs.model).train(), inputs.splits["train"], np.arange(60)
    expected = []
    for step in range(4):
        logits = classifier(split.tokens.inputs(rows), dropout.example_keys(rows, seed=42, step=step))
        expected.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(split.rows.labels)).item())
    np.testing.assert_allclose(outcome.losses, expected, rtol=1e-6)
    assert np.diff(sorted(expected)).min() > 1e-5  # no two steps drop the same


def test_weights_after_sgd_are_those_of_a_plain_loop(place: Path) -> None:
    """AdamW forgives a wrong scale and a skipped decay for a while; SGD does not."""
    recipe = write_recipe_in(
        place,
        "sgd.yaml",
        model=NO_DROPOUT,
        training={**FIVE_STEPS, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": None, "weight_decay": 0.1},
        saving={"load_best_model_at_end": False},
    )
    outcome = run_trainer(recipe, place / "sgd", "--max_tokens_per_device", "32")
    inputs = inputs_of(recipe, place)
    model, split = inputs.model.train(), inputs.splits["train"]
    for step in range(5):
        rows = order.global_batch(step, seed=42, num_examples=60, global_batch_size=16)
        model.zero_grad()
        model(**split.tokens.inputs(rows), labels=torch.from_numpy(split.rows.labels[rows])).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                decay = 0.1 if parameter.dim() > 1 else 0.0
                parameter -= 0.5 * (5 - step) / 5 * (parameter.grad + decay * parameter)
    for name, weight in outcome.weights.items():
        torch.testing.assert_close(weight, model.state_dict()[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("max_tokens", [16, 50])
def test_micro_batches_change_nothing(place: Path, plain: Outcome, max_tokens: int) -> None:
    outcome = run_trainer(
        place / "plain.yaml", place / f"micro-{max_tokens}", "--max_tokens_per_device", str(max_tokens)
    )
    assert outcome.code == 0, outcome.err
    assert len(outcome.losses) == 8
    np.testing.assert_allclose(outcome.losses, plain.losses, rtol=0, atol=2e-6)
    norms = [[line["grad_norm"] for line in run.steps] for run in (outcome, plain)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-5)
    assert outcome.evaluations[-1] == pytest.approx(plain.evaluations[-1], abs=2e-6)


def test_the_layout_changes_nothing_but_what_is_computed(place: Path, whole: Outcome) -> None:
    """With dropout everywhere; packed without being asked."""
    padded = run_trainer(place / "whole.yaml", place / "padded", "--layout", "padded")
    assert padded.code == 0, padded.err
    assert [run.json("run.json")["layout"] for run in (whole, padded)] == ["packed", "padded"]
    assert "float32, packed without padding" in whole.err
    assert "float32, padded" in padded.err
    np.testing.assert_allclose(padded.losses, whole.losses, rtol=0, atol=2e-6)
    norms = [[line["grad_norm"] for line in run.steps] for run in (padded, whole)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-5)
    assert padded.evaluations[-1] == pytest.approx(whole.evaluations[-1], abs=2e-6)
    avoided = [run.json("results.json")["train"]["padding_avoided"] for run in (whole, padded)]
    assert avoided[0] > avoided[1]
    asked = run_trainer(place / "whole.yaml", place / "packed", "--layout", "packed")
    assert asked.lines == whole.lines
    assert same_weights(asked, whole)


def test_a_run_goes_on_in_another_layout(place: Path, whole: Outcome) -> None:
    folder = place / "relaid"
    assert run_trainer(place / "whole.yaml", folder, "--layout", "padded", "--stop_after", "3").code == 75
    resumed = run_trainer(place / "whole.yaml", folder, "--layout", "packed", "--resume")
    assert resumed.code == 0, resumed.err
    assert resumed.json("run.json")["layout"] == "packed"
    np.testing.assert_allclose(resumed.losses, whole.losses, rtol=0, atol=2e-6)


def test_the_same_run_twice_is_the_same(place: Path, whole: Outcome) -> None:
    again = run_trainer(place / "whole.yaml", place / "again")
    assert again.lines == whole.lines
    assert same_weights(again, whole)
    other = run_trainer(place / "whole.yaml", place / "other-seed", "training.seed=1")
    assert other.losses != whole.losses


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(("step", "max_tokens"), [(0, 30), (0, 10_000), (7, 10_000), (7, 1)])
def test_averaged_gradients_are_those_of_the_global_batch(
    place: Path, processes: int, step: int, max_tokens: int, packed: bool
) -> None:
    """What DDP's average over `processes` makes of the shares, fillers among them, is one gradient of the whole batch."""
    from accel_trainer.feed import Feed
    from accel_trainer.train import training_step

    # 58 examples: the last batch, step 7, has two, so that of three processes one has nothing but a filler.
    recipe = write_recipe_in(
        place, f"shares-{processes}.yaml", model=NO_DROPOUT, dataset={"splits": {"train": 58, "validation": 20}}
    )
    inputs = inputs_of(recipe, place)
    model, split, resolved = inputs.model.train(), inputs.splits["train"], inputs.recipe
    rows = order.global_batch(step, seed=42, num_examples=58, global_batch_size=8)
    labels = torch.from_numpy(split.rows.labels[rows])
    loss = torch.nn.functional.cross_entropy(model(**split.tokens.inputs(rows)).logits, labels)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    classifier = Classifier(model)
    total = {name: torch.zeros_like(gradient) for name, gradient in expected.items()}
    losses, passes = [], []
    for index in range(processes):
        accelerator: Any = OneOfMany(index, processes)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        updates: list[int] = []
        optimizer.step = lambda updates=updates: (  # type: ignore[method-assign]
            updates.append(1),
            [total[name].add_(p.grad / processes) for name, p in model.named_parameters() if p.grad is not None],
        )
        rates = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(rates, lambda k: 10.0 - k)
        rates.step()  # or torch warns
        unclipped = resolved.model_copy(
            update={"training": resolved.training.model_copy(update={"max_grad_norm": None})}
        )
        run: Any = SimpleNamespace(
            accelerator=accelerator,
            inputs=dataclasses.replace(inputs, recipe=unclipped),
            model=classifier,
            optimizer=optimizer,
            scheduler=scheduler,
            feed=Feed(split, resolved.training, processes, index, packed, device=torch.device("cpu")),
            max_tokens=max_tokens,
        )
        done = training_step(run, step)
        assert len(updates) == 1
        assert scheduler.get_last_lr() == [9.0]
        assert done.learning_rate == 10.0
        assert done.work.examples == len(rows)
        assert done.work.tokens == int(split.tokens.lengths[rows].sum())
        assert accelerator.synchronised == [False] * (len(accelerator.synchronised) - 1) + [True]
        losses.append(float(done.loss_sum))
        passes.append(len(accelerator.synchronised))
    assert len(set(passes)) == 1
    assert sum(losses) / len(rows) == pytest.approx(loss.item(), abs=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(total[name], gradient, rtol=1e-4, atol=1e-7)


# --- going on


@pytest.mark.parametrize("step", range(1, 9))
def test_resume_from_every_step_is_bitwise(place: Path, whole: Outcome, step: int) -> None:
    folder = place / f"resumed-{step}"
    shutil.copytree(whole.folder, folder)
    for later in range(step + 1, 9):
        shutil.rmtree(folder / "checkpoints" / f"checkpoint-{later}")
    for name in ("model", "results.json"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = run_trainer(place / "whole.yaml", folder, "--resume")
    assert resumed.code == 0, resumed.err
    assert f"step {step} of 8" in resumed.err
    assert resumed.lines == whole.lines
    assert same_weights(resumed, whole)
    for name in ("model.safetensors", "optimizer.safetensors"):
        last = Path("checkpoints") / "checkpoint-8" / name
        assert (folder / last).read_bytes() == (whole.folder / last).read_bytes()
    for split in ("validation", "test"):
        assert resumed.json("results.json")[split] == whole.json("results.json")[split]
    for key in ("steps", "examples", "tokens", "best_step", "best_metric", "padding_avoided"):
        assert resumed.json("results.json")["train"][key] == whole.json("results.json")["train"][key]


def test_resume_from_a_given_checkpoint(place: Path, whole: Outcome) -> None:
    saved = whole.folder / "checkpoints" / "checkpoint-3"
    outcome = run_trainer(place / "whole.yaml", place / "from-3", "--resume_from_checkpoint", str(saved))
    assert outcome.code == 0, outcome.err
    assert outcome.losses == whole.losses[3:]
    assert outcome.checkpoints() == [f"checkpoint-{step}" for step in range(4, 9)]
    assert "the best weights so far, of step" in outcome.err  # they are in the other folder
    assert outcome.json("results.json")["train"]["best_step"] > 3
    final = Path("checkpoints") / "checkpoint-8" / "model.safetensors"
    assert (outcome.folder / final).read_bytes() == (whole.folder / final).read_bytes()


def test_resume_passes_over_a_damaged_checkpoint(place: Path, whole: Outcome) -> None:
    folder = place / "damaged"
    shutil.copytree(whole.folder, folder)
    with (folder / "checkpoints" / "checkpoint-8" / "optimizer.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    outcome = run_trainer(place / "whole.yaml", folder, "--resume", "saving.save_total_limit=1")
    assert outcome.code == 0, outcome.err
    assert "checkpoint-8 is damaged" in outcome.err
    assert "step 7 of 8" in outcome.err
    assert same_weights(outcome, whole)
    assert outcome.checkpoints() == ["abandoned-checkpoint-8", "checkpoint-8"]


def test_resume_without_checkpoints_starts(place: Path, whole: Outcome) -> None:
    outcome = run_trainer(place / "whole.yaml", place / "afresh", "--resume", "saving.save_strategy=no")
    assert outcome.code == 0, outcome.err
    assert "starting from the beginning" in outcome.err
    assert outcome.losses == whole.losses
    again = run_trainer(place / "whole.yaml", place / "afresh", "--resume", "saving.save_strategy=no")
    assert again.lines == outcome.lines


def test_resume_where_no_checkpoint_can_be_used_touches_nothing(place: Path, whole: Outcome) -> None:
    folder = place / "all-damaged"
    shutil.copytree(whole.folder, folder)
    for path in (folder / "checkpoints").iterdir():
        (path / "trainer_state.json").write_text("{}")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    resumed = run_trainer(place / "whole.yaml", folder, "--resume")
    assert resumed.code == 2
    assert resumed.err.count("is damaged") == 8
    assert "none of the checkpoints can be gone on from; bring one back" in resumed.err
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path for path in before if before[path] != after.get(path)} == {folder / "status.json"}


def test_what_may_change_must_exist(place: Path, whole: Outcome) -> None:
    folder = place / "allowed"
    shutil.copytree(whole.folder, folder)
    outcome = run_trainer(place / "whole.yaml", folder, "--resume", "--allow_changed", "training.learning_rat")
    assert outcome.code == 2
    assert "--allow_changed training.learning_rat: there is no such key" in outcome.err


def test_a_checkpoint_that_is_none(place: Path, whole: Outcome) -> None:
    outcome = run_trainer(place / "whole.yaml", place / "none", "--resume_from_checkpoint", str(place / "nowhere"))
    assert outcome.code == 2
    assert "nowhere: there is no such folder" in outcome.err


def test_resume_refuses_other_mathematics(place: Path, whole: Outcome) -> None:
    folder = place / "other-rate"
    shutil.copytree(whole.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-8")
    before = (folder / "metrics.jsonl").read_bytes()
    changed = ("training.learning_rate=0.002", "training.warmup_steps=2")
    refused = run_trainer(place / "whole.yaml", folder, "--resume", *changed)
    assert refused.code == 2
    assert "training.learning_rate: 0.001 in the checkpoint, 0.002 now" in refused.err
    assert "training.warmup_steps" in refused.err
    assert "Traceback" not in refused.err
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert refused.json("status.json")["state"] == "failed"
    partly = run_trainer(
        place / "whole.yaml", folder, "--resume", *changed, "--allow_changed", "training.learning_rate"
    )
    assert partly.code == 2
    assert "learning_rate" not in partly.err
    allowed = run_trainer(place / "whole.yaml", folder, "--resume", *changed, "--allow_changed", "training")
    assert allowed.code == 0, allowed.err
    assert [line["learning_rate"] for line in allowed.steps[:7]] == [line["learning_rate"] for line in whole.steps[:7]]
    assert allowed.steps[7]["learning_rate"] == pytest.approx(0.002 / 6)  # (8 - 7) / (8 - 2) of the new one


def test_resume_refuses_other_data(place: Path, whole: Outcome) -> None:
    folder, data = place / "other-data", place / "other-data.csv"
    shutil.copytree(whole.folder, folder)
    write_csv(data, [(text + " x", label) for text, label in reviews(90)])
    outcome = run_trainer(place / "whole.yaml", folder, "--resume", f"dataset.path={data}")
    assert outcome.code == 2
    assert "data.train:" in outcome.err
    shutil.copy(place / "reviews.csv", data)  # the same rows elsewhere are the same mathematics
    assert run_trainer(place / "whole.yaml", folder, "--resume", f"dataset.path={data}").code == 0


@pytest.mark.parametrize("entry", ["layer_norm_eps", "hidden_dropout_prob"])
def test_resume_refuses_another_config_of_the_checkpoint(place: Path, whole: Outcome, entry: str) -> None:
    """Nothing in the recipe says what the checkpoint's config holds, but every step depends on it."""
    other, folder = place / f"other-{entry}", place / f"other-{entry}-run"
    shutil.copytree(whole.folder / "model", other)
    recipe = write_recipe_in(
        place,
        f"other-{entry}.yaml",
        model={"checkpoint": str(other), "from_config": None, "train_tokenizer": None},
        training={"max_steps": 2},
        saving={"save_strategy": "steps", "save_steps": 1},
    )
    assert run_trainer(recipe, folder).code == 0
    shutil.rmtree(folder / "checkpoints" / "checkpoint-2")
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    before = config[entry]
    config[entry] = 0.25
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused = run_trainer(recipe, folder, "--resume")
    assert refused.code == 2
    assert f"  config.{entry}: {before!r} in the checkpoint, 0.25 now" in refused.err.splitlines()
    assert refused.err.count(" in the checkpoint, ") == 1
    assert run_trainer(recipe, folder, "--resume", "--allow_changed", f"config.{entry}").code == 0


def test_what_is_no_mathematics_may_change(place: Path, whole: Outcome) -> None:
    folder = place / "talkative"
    shutil.copytree(whole.folder, folder)
    for later in (7, 8):
        shutil.rmtree(folder / "checkpoints" / f"checkpoint-{later}")
    outcome = run_trainer(place / "whole.yaml", folder, "--resume", "tracking.logging_steps=2", "saving.save_steps=4")
    assert outcome.code == 0, outcome.err
    assert same_weights(outcome, whole)
    assert [line["step"] for line in outcome.steps] == [1, 2, 3, 4, 5, 6, 8]


def test_logged_losses_are_means_over_examples(place: Path, plain: Outcome) -> None:
    """Logged every 3 steps, evaluated and saved in between: means over 8 examples a step, 4 in the last."""
    sizes = [8] * 7 + [4]
    outcome = run_trainer(
        place / "plain.yaml", place / "every-3", "tracking.logging_steps=3", "saving.save_strategy=steps",
        "saving.save_steps=4", "evaluation.eval_strategy=steps", "evaluation.eval_steps=2",
    )  # fmt: skip
    assert [line["step"] for line in outcome.steps] == [3, 6, 8]
    for line in outcome.steps:
        part = slice((line["step"] - 1) // 3 * 3, line["step"])
        assert line["loss"] == pytest.approx(np.average(plain.losses[part], weights=sizes[part]), abs=1e-6)
    shutil.rmtree(outcome.folder / "checkpoints" / "checkpoint-8")
    resumed = run_trainer(
        place / "plain.yaml", place / "every-3", "--resume", "tracking.logging_steps=3", "saving.save_strategy=steps",
        "saving.save_steps=4", "evaluation.eval_strategy=steps", "evaluation.eval_steps=2",
    )  # fmt: skip
    assert resumed.steps == outcome.steps


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(place: Path, whole: Outcome, number: signal.Signals) -> None:
    folder = place / f"stopped-{number}"
    with signal_at(3, number):
        stopped = run_trainer(place / "whole.yaml", folder, "saving.save_steps=100")
    assert stopped.code == 75, stopped.err
    assert "interrupted after step 3 of 8; continue with --resume" in stopped.err
    assert "error" not in stopped.err
    status = stopped.json("status.json")
    assert (status["state"], status["exit_code"], status["step"]) == ("interrupted", 75, 3)
    assert stopped.checkpoints() == ["checkpoint-3"]
    assert not (folder / "model").exists()
    resumed = run_trainer(place / "whole.yaml", folder, "--resume", "saving.save_steps=100")
    assert resumed.code == 0, resumed.err
    assert resumed.lines == whole.lines
    assert same_weights(resumed, whole)


def test_a_signal_saves_even_where_nothing_else_does(place: Path, whole: Outcome) -> None:
    with signal_at(2, signal.SIGTERM):
        outcome = run_trainer(place / "whole.yaml", place / "stopped-unsaved", "saving.save_strategy=no")
    assert outcome.code == 75
    assert outcome.checkpoints() == ["checkpoint-2"]


def test_a_storm_of_signals_while_saving(place: Path, whole: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    from accel_trainer import checkpoint

    save: Callable[..., None] = checkpoint.save_file

    def stormy(*arguments: Any, **keywords: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        save(*arguments, **keywords)
        os.kill(os.getpid(), signal.SIGTERM)

    folder = place / "storm"
    with monkeypatch.context() as patch, signal_at(3, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        patch.setattr(checkpoint, "save_file", stormy)
        stopped = run_trainer(place / "whole.yaml", folder, "saving.save_steps=100")
    assert stopped.code == 75, stopped.err
    assert stopped.checkpoints() == ["checkpoint-3"]
    assert stopped.json("status.json")["state"] == "interrupted"
    resumed = run_trainer(place / "whole.yaml", folder, "--resume", "saving.save_steps=100")
    assert resumed.lines == whole.lines
    assert same_weights(resumed, whole)


@contextmanager
def signal_in_evaluation(number: int) -> Iterator[list[int]]:
    """SIGTERM before the second micro-batch of the evaluation of that number, counted from 1; yields those that ended."""

    predict, begun, ended = scoring.predict_logits, itertools.count(1), list[int]()

    def predicted(*arguments: Any, between: Callable[[], None], **keywords: Any) -> Any:
        evaluation, micro_batches = next(begun), itertools.count(1)

        def signalled() -> None:
            between()
            if evaluation == number and next(micro_batches) == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        logits = predict(*arguments, between=signalled, **keywords)
        ended.append(evaluation)
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "predict_logits", predicted)
        yield ended


@pytest.mark.parametrize("saving", ["saving.save_steps=100", "saving.save_strategy=no"])
@pytest.mark.parametrize("evaluation", [1, 3, 8, 9, 10])
def test_a_signal_during_an_evaluation_breaks_it_off(place: Path, whole: Outcome, evaluation: int, saving: str) -> None:
    """Of eight during training and two after it. It is made up for, before anything else, by the run that goes on."""
    folder = place / f"stopped-evaluating-{evaluation}-{saving.rpartition('=')[2]}"
    arguments = (saving, "--max_tokens_per_device", "60")
    with signal_in_evaluation(evaluation) as ended:
        stopped = run_trainer(place / "whole.yaml", folder, *arguments)
    assert stopped.code == 75, stopped.err
    assert ended == list(range(1, evaluation))
    step = min(evaluation, 8)
    assert stopped.json("status.json")["step"] == step
    assert stopped.json("status.json")["state"] == "interrupted"
    assert stopped.checkpoints() == [f"checkpoint-{step}"]
    assert len(stopped.evaluations) == min(evaluation - 1, 8)
    assert not (folder / "model").exists()
    resumed = run_trainer(place / "whole.yaml", folder, "--resume", *arguments)
    assert resumed.code == 0, resumed.err
    undisturbed = run_trainer(place / "whole.yaml", place / f"undisturbed-{evaluation}-{len(saving)}", *arguments)
    assert resumed.lines == undisturbed.lines
    assert same_weights(resumed, undisturbed)
    for entry in ("validation", "test"):
        assert resumed.json("results.json")[entry] == undisturbed.json("results.json")[entry]
    if saving.endswith("100"):
        last = "checkpoints/checkpoint-8/model.safetensors"
        assert (resumed.folder / last).read_bytes() == (undisturbed.folder / last).read_bytes()


def test_a_kill_after_an_evaluation_was_made_up_for(place: Path, whole: Outcome) -> None:
    """And before the next checkpoint: it is made up for once more, and told of once."""
    folder = place / "made-up-twice"
    with signal_in_evaluation(3):
        run_trainer(place / "whole.yaml", folder, "saving.save_steps=100")
    with killed_before_step(3):
        run_trainer(place / "whole.yaml", folder, "--resume", "saving.save_strategy=no")
    resumed = run_trainer(place / "whole.yaml", folder, "--resume", "saving.save_steps=100")
    assert resumed.code == 0, resumed.err
    assert resumed.lines == whole.lines
    assert same_weights(resumed, whole)


def test_a_signal_while_saving_at_a_moment_of_the_plan_stops_there(
    place: Path, whole: Outcome, monkeypatch: Any
) -> None:
    """No other step is taken, and no other checkpoint written."""
    from accel_trainer import checkpoint

    save: Callable[..., None] = checkpoint.save_file

    def signalled(tensors: Any, path: Path, **keywords: Any) -> None:
        save(tensors, path, **keywords)
        if "checkpoint-4" in str(path):
            os.kill(os.getpid(), signal.SIGTERM)

    folder = place / "stopped-saving"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", signalled)
        stopped = run_trainer(place / "whole.yaml", folder, "saving.save_steps=4")
    assert stopped.code == 75, stopped.err
    assert stopped.checkpoints() == ["checkpoint-4"]
    resumed = run_trainer(place / "whole.yaml", folder, "--resume", "saving.save_steps=4")
    assert resumed.lines == whole.lines
    assert same_weights(resumed, whole)


def test_a_signal_after_everything_is_computed_ends_well(place: Path, whole: Outcome, monkeypatch: Any) -> None:

    write = finishing.write_model

    def signalled(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(finishing, "write_model", signalled)
        outcome = run_trainer(place / "whole.yaml", place / "signalled-late")
    assert outcome.code == 0, outcome.err
    assert outcome.json("status.json")["state"] == "done"
    assert same_weights(outcome, whole)


def test_the_recipe_of_a_run_runs_again(place: Path, whole: Outcome) -> None:
    outcome = run_trainer(whole.folder / "recipe.yaml", place / "from-recipe")
    assert outcome.code == 0, outcome.err
    assert outcome.lines == whole.lines
    again, pinned = (
        yaml.safe_load((run.folder / "recipe.yaml").read_text(encoding="utf-8")) for run in (outcome, whole)
    )
    assert again == pinned
    assert set(pinned["dataset"]["sha256"]) == {"train", "validation", "test"}


# --- the best weights across restarts

# At this rate the loss falls and rises, so that the best step is neither the first nor the last.
BEST = {
    "training": {"learning_rate": 0.05, "lr_scheduler_type": "constant", "num_train_epochs": 2},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1, "metrics": ["accuracy"]},
    "saving": {"save_strategy": "steps", "save_steps": 100},
}


class Killed(BaseException):
    """Stands for SIGKILL, as far as weights and checkpoints go."""


@contextmanager
def killed_before_save(step: int) -> Iterator[None]:
    """Die after that step's evaluation, when the best weights are exchanged and the checkpoint is not begun."""
    from accel_trainer import train

    save = train.save

    def dying(run: Any) -> None:
        if run.state.step == step:
            raise Killed
        save(run)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "save", dying)
        yield


@contextmanager
def killed_before_step(step: int) -> Iterator[None]:
    """Die when that step, counted from 0, is to be taken."""
    from accel_trainer import train

    take = train.training_step

    def dying(run: Any, at: int) -> Any:
        if at == step:
            raise Killed
        return take(run, at)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "training_step", dying)
        yield


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Outcome:
    outcome = run_trainer(write_recipe_in(place, "best.yaml", **BEST), place / "undisturbed")
    assert outcome.code == 0, outcome.err
    return outcome


def improvements(outcome: Outcome) -> list[int]:
    """Steps at which the loss was the lowest so far."""
    steps, lowest = [], math.inf
    for line in outcome.evaluations:
        if line["loss"] < lowest:
            steps, lowest = [*steps, line["step"]], line["loss"]
    return steps


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_kill_between_a_new_best_and_the_next_checkpoint(place: Path, undisturbed: Outcome, every: int) -> None:
    """The state that is restored remembers a best of before; its weights must be there still."""
    found = improvements(undisturbed)
    assert len(found) >= 2
    assert found[-1] < 16
    # The save after the last improvement, or, if that is best long since, the first one after it.
    step = -(-found[-1] // every) * every
    folder = place / f"killed-{every}"
    with killed_before_save(step):
        run_trainer(place / "best.yaml", folder, f"saving.save_steps={every}")
    assert (folder / ".best-before").exists() == (step > every)  # without a checkpoint nothing remembers it
    resumed = run_trainer(place / "best.yaml", folder, "--resume", f"saving.save_steps={every}")
    assert resumed.code == 0, resumed.err
    assert "the best weights so far" not in resumed.err
    assert resumed.lines == undisturbed.lines
    assert same_weights(resumed, undisturbed)
    assert resumed.json("results.json")["validation"] == undisturbed.json("results.json")["validation"]
    assert list(folder.rglob(".*")) == [folder / ".lock"]


def test_a_kill_while_the_old_best_was_deleted(place: Path, undisturbed: Outcome) -> None:
    """What is left of it is in nobody's way when the run is killed once more, after the next best."""
    folder, step = place / "killed-twice", improvements(undisturbed)[-1]
    with killed_before_save(step):
        run_trainer(place / "best.yaml", folder, "saving.save_steps=1")
    shutil.rmtree(folder / "best")
    (folder / ".best-before").rename(folder / "best")  # as after the checkpoint before
    (folder / ".best-before").mkdir()
    with killed_before_save(step):
        run_trainer(place / "best.yaml", folder, "--resume", "saving.save_steps=1")
    resumed = run_trainer(place / "best.yaml", folder, "--resume", "saving.save_steps=1")
    assert resumed.code == 0, resumed.err
    assert "the best weights so far" not in resumed.err
    assert resumed.lines == undisturbed.lines
    assert same_weights(resumed, undisturbed)


def test_a_kill_before_the_first_checkpoint(place: Path, undisturbed: Outcome) -> None:
    folder = place / "killed-early"
    with killed_before_save(5):
        run_trainer(place / "best.yaml", folder, "saving.save_steps=5")
    resumed = run_trainer(place / "best.yaml", folder, "--resume", "saving.save_steps=5")
    assert "starting from the beginning" in resumed.err
    assert resumed.lines == undisturbed.lines
    assert same_weights(resumed, undisturbed)


def test_the_best_of_an_abandoned_history_is_forgotten(place: Path, undisturbed: Outcome) -> None:
    """Back to an older checkpoint with another rate: what the final model holds was reached on this way."""
    folder = place / "other-history"
    run_trainer(place / "best.yaml", folder, "saving.save_steps=1")
    best = improvements(undisturbed)[-1]
    old = folder / "checkpoints" / f"checkpoint-{best - 1}"
    changed = ("training.learning_rate=1e-12", "--allow_changed", "training.learning_rate")
    outcome = run_trainer(
        place / "best.yaml", folder, "--resume_from_checkpoint", str(old), "saving.save_steps=1", *changed
    )
    assert outcome.code == 0, outcome.err
    assert f"the best weights so far, of step {improvements(undisturbed)[-2]}, are no longer in" in outcome.err
    step = outcome.json("results.json")["train"]["best_step"]
    assert step >= best
    assert json.loads((folder / "best" / "training.json").read_text()) == {"step": step}
    contained = load_file(folder / "checkpoints" / f"checkpoint-{step}" / "model.safetensors")
    assert all(torch.equal(contained[name], weight) for name, weight in outcome.weights.items())
    [line] = [line for line in outcome.evaluations if line["step"] == step]
    assert outcome.json("results.json")["validation"]["loss"] == line["loss"]
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {f"checkpoint-{k}" for k in range(1, 17)} | {f"abandoned-checkpoint-{k}" for k in range(best, 17)}
    again = run_trainer(place / "best.yaml", folder, "--resume", "saving.save_steps=1", changed[0])
    assert again.code == 0, again.err  # the newest is of this history


def test_best_weights_that_are_gone_at_the_end(place: Path, undisturbed: Outcome, monkeypatch: Any) -> None:
    from accel_trainer import train

    finish = train.finish

    def robbed(run: Any, stop: Any) -> Any:
        (run.folder.best / "model.safetensors").write_bytes(b"")
        return finish(run, stop)

    folder = place / "robbed"
    with monkeypatch.context() as patch:
        patch.setattr(train, "finish", robbed)
        outcome = run_trainer(place / "best.yaml", folder)
    assert outcome.code == 2
    assert f"the weights of step {improvements(undisturbed)[-1]} are not there or damaged" in outcome.err
    assert not (folder / "model").exists()
    mended = run_trainer(place / "best.yaml", folder, "--resume", "saving.load_best_model_at_end=false")
    assert mended.code == 0, mended.err


# --- durations and moments


def test_early_stopping(place: Path) -> None:
    recipe = write_recipe_in(
        place,
        "early.yaml",
        training={"learning_rate": 0.05, "num_train_epochs": 4},
        evaluation={"eval_strategy": "steps", "eval_steps": 2, "early_stopping_patience": 2, "metrics": ["accuracy"]},
        saving={"save_strategy": "steps", "save_steps": 5},
    )
    outcome = run_trainer(recipe, place / "early")
    assert outcome.code == 0, outcome.err
    losses = [line["loss"] for line in outcome.evaluations]
    results = outcome.json("results.json")["train"]
    assert results["stopped_early"] is True
    assert results["steps"] == 2 * len(losses) < 32
    waited, best = 0, math.inf
    for i, loss in enumerate(losses):
        waited = 0 if loss < best else waited + 1
        best = min(best, loss)
        assert (waited == 2) == (i == len(losses) - 1)
    assert f"checkpoint-{results['steps']}" in outcome.checkpoints()
    resumed = run_trainer(recipe, place / "early", "--resume")
    assert resumed.json("results.json")["train"]["steps"] == results["steps"]
    assert resumed.lines == outcome.lines


@pytest.mark.parametrize(
    ("overrides", "evaluated", "logged", "saved"),
    [
        (["evaluation.eval_strategy=epoch", "saving.save_strategy=epoch"], [4, 8, 10], 10, [4, 8, 10]),
        (["evaluation.eval_strategy=steps", "evaluation.eval_steps=3", "saving.save_strategy=steps", "saving.save_steps=4",
          "saving.save_total_limit=2"], [3, 6, 9, 10], 10, [8, 10]),
        (["evaluation.eval_strategy=no", "saving.save_strategy=no"], [], 10, []),
    ],
)  # fmt: skip
def test_moments(place: Path, overrides: list[str], evaluated: list[int], logged: int, saved: list[int]) -> None:
    recipe = write_recipe_in(place, "moments.yaml", training={"global_batch_size": 16, "num_train_epochs": 2.5})
    outcome = run_trainer(recipe, place / f"moments-{len(evaluated)}", *overrides)
    assert outcome.code == 0, outcome.err
    assert [line["step"] for line in outcome.evaluations] == evaluated
    assert len(outcome.steps) == logged
    assert outcome.steps[-1]["epoch"] == pytest.approx(2 + 32 / 60, abs=1e-6)
    assert outcome.json("results.json")["train"]["examples"] == 60 * 2 + 32
    found = sorted(int(name.split("-")[1]) for name in outcome.checkpoints()) if saved else []
    assert found == saved
    assert "validation" in outcome.json("results.json")


def test_half_an_epoch(place: Path) -> None:
    outcome = run_trainer(write_recipe_in(place, "half.yaml", training={"num_train_epochs": 0.5}), place / "half")
    assert len(outcome.steps) == 4
    assert outcome.steps[-1]["learning_rate"] == pytest.approx(1e-3 / 4)


def test_a_batch_larger_than_the_data(place: Path) -> None:
    recipe = write_recipe_in(place, "large.yaml", training={"global_batch_size": 1000, "num_train_epochs": 2})
    outcome = run_trainer(recipe, place / "large")
    assert outcome.code == 0, outcome.err
    assert len(outcome.steps) == 2


# --- fp16


@contextmanager
def half_precision(power: int, overflowing: Callable[[int], bool]) -> Iterator[list[tuple[bool, bool]]]:
    """A real GradScaler of 2^power around float32, and gradients that overflow at some attempts, counted from 1.

    Scaling by powers of two is exact, so that nothing but the scaler differs from a plain run. Yields, for every attempt,
    whether it overflowed and what Accelerate said of it.
    """
    from accel_trainer import hardware, train

    start, prepare, losses_of, step_of = (
        hardware.start_accelerator,
        opening.prepare,
        train.example_losses,
        train.training_step,
    )
    attempts: list[tuple[bool, bool]] = []

    def started(*arguments: Any) -> Any:
        accelerator = start(*arguments)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**power)
        return accelerator

    def prepared(*arguments: Any, **keywords: Any) -> Any:
        run = prepare(*arguments, **keywords)
        assert run.optimizer.scaler is run.accelerator.scaler
        run.accelerator.native_amp = True  # so that it unscales before it clips
        run.accelerator.state._mixed_precision = "fp16"
        return run

    def attempted(run: Any, step: int) -> Any:
        def snapshot() -> Any:
            weights = {name: weight.clone() for name, weight in run.model.state_dict().items()}
            state = run.optimizer.optimizer.state
            kept = [value for entries in state.values() for value in entries.values()]
            moments = [torch.as_tensor(value).clone() for value in kept if torch.as_tensor(value).any()]
            return weights, moments, run.scheduler.last_epoch, run.scheduler.get_last_lr()

        before, scale = snapshot(), run.accelerator.scaler.get_scale()
        try:
            done = step_of(run, step)
        except train.GradientOverflow:
            attempts.append((True, run.optimizer.step_was_skipped))
            torch.testing.assert_close(snapshot(), before, rtol=0, atol=0)
            assert run.accelerator.scaler.get_scale() == scale / 2
            assert all(parameter.grad is None for parameter in run.model.parameters())
            raise
        attempts.append((False, run.optimizer.step_was_skipped))
        assert run.scheduler.last_epoch == step + 1
        return done

    def losses(*arguments: Any) -> torch.Tensor:
        return losses_of(*arguments) * (float("inf") if overflowing(len(attempts) + 1) else 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "start_accelerator", started)
        patch.setattr(opening, "prepare", prepared)
        patch.setattr(train, "training_step", attempted)
        patch.setattr(train, "example_losses", losses)
        yield attempts


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_overflows_change_nothing(place: Path, optim: str) -> None:
    """What is fused skips inside its kernel, where Accelerate does not see it; Adafactor is skipped by the scaler."""
    recipe = write_recipe_in(place, f"half-{optim}.yaml", training={"optim": optim, "learning_rate": 0.05})
    saving = ("saving.save_strategy=steps", "saving.save_steps=4")
    with half_precision(12, lambda attempt: False) as attempts:
        smooth = run_trainer(recipe, place / f"half-smooth-{optim}", *saving)
    assert smooth.code == 0, smooth.err
    assert attempts == [(False, False)] * 8
    with half_precision(12, lambda attempt: attempt in (1, 4, 5)) as attempts:
        outcome = run_trainer(recipe, place / f"half-rough-{optim}", *saving)
    assert outcome.code == 0, outcome.err
    seen = optim == "adafactor"
    steps = [True, False, False, True, True, *[False] * 6]
    assert attempts == [(overflowed, overflowed and seen) for overflowed in steps]
    assert outcome.lines == smooth.lines
    assert same_weights(outcome, smooth)
    assert outcome.json("results.json")["train"]["overflows"] == 3
    state = json.loads((outcome.folder / "checkpoints/checkpoint-8/trainer_state.json").read_text())
    assert state["scaler"]["scale"] == 2.0**9
    plain = run_trainer(recipe, place / f"half-plain-{optim}", *saving)
    np.testing.assert_allclose(outcome.losses, plain.losses, rtol=0, atol=1e-6)

    shutil.rmtree(outcome.folder / "checkpoints" / "checkpoint-8")
    with half_precision(12, lambda attempt: False):  # the scale comes back with the checkpoint
        resumed = run_trainer(recipe, outcome.folder, "--resume", *saving)
    assert resumed.lines == smooth.lines
    assert same_weights(resumed, smooth)
    again = json.loads((outcome.folder / "checkpoints/checkpoint-8/trainer_state.json").read_text())
    assert again["scaler"] == state["scaler"]
    assert again["state"]["overflows"] == 3


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_a_gradient_that_is_never_finite(place: Path, optim: str) -> None:
    recipe = write_recipe_in(place, f"never-{optim}.yaml", training={"optim": optim})
    saving = ("saving.save_strategy=steps", "saving.save_steps=1")
    with half_precision(4, lambda attempt: attempt > 2) as attempts:
        outcome = run_trainer(recipe, place / f"never-{optim}", *saving)
    assert outcome.code == 1
    assert "the loss or the gradient of step 3 is not finite" in outcome.err
    assert "in fp16 at any scale: bf16 or float32" in outcome.err
    assert outcome.json("not_finite.json")["step"] == 3
    assert "Traceback" not in outcome.err
    assert len(attempts) == 2 + 4  # at scales 16, 8, 4 and 2; at 1 it failed
    assert outcome.checkpoints() == ["checkpoint-1", "checkpoint-2"]
    status = outcome.json("status.json")
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 1, 2)


# --- settings


def test_freezing_leaves_weights_untouched(place: Path) -> None:
    recipe = write_recipe_in(
        place,
        "frozen.yaml",
        model={"freeze_layers": 1},
        training={"weight_decay": 0.1, "learning_rate": 0.01},
        saving={"load_best_model_at_end": False},
    )
    outcome = run_trainer(recipe, place / "frozen")
    assert outcome.code == 0, outcome.err
    before = inputs_of(recipe, place).model.state_dict()
    moved = {name for name, weight in outcome.weights.items() if not torch.equal(weight, before[name])}
    frozen = {name for name in before if ".embeddings." in name or ".layer.0." in name}
    assert frozen
    assert moved == set(outcome.weights) - frozen
    counts = outcome.json("run.json")["parameters"]
    assert counts["total"] - counts["trainable"] == sum(before[name].numel() for name in frozen)
    assert run_trainer(recipe, place / "frozen", "--resume").code == 0


def test_an_encoder_that_cannot_keep_the_promise_is_refused(place: Path) -> None:
    """XLM draws dropout of its own, and is welcome without; FNet mixes padding into the text, whatever is set."""
    xlm = {"model_type": "xlm", "emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}
    short = {"training": {"max_steps": 2, "num_train_epochs": None}, "evaluation": {"eval_strategy": "no"}}
    recipe = write_recipe_in(place, "xlm.yaml", model={"from_config": xlm}, saving={"save_strategy": "no"}, **short)
    refused = run_trainer(recipe, place / "xlm")
    assert refused.code == 2
    assert "error: model: in training, a xlm classifier draws random numbers" in refused.err
    remedy = [word.rstrip(",") for word in refused.err.split() if word.startswith("model.")]
    assert remedy == ["model.hidden_dropout=0.0", "model.attention_dropout=0.0"]
    assert run_trainer(recipe, place / "xlm-without", *remedy).code == 0
    fnet = {"model_type": "fnet", "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    recipe = write_recipe_in(place, "fnet.yaml", model={"from_config": fnet}, saving={"save_strategy": "no"}, **short)
    refused = run_trainer(recipe, place / "fnet")
    assert refused.code == 2
    assert "a fnet classifier computes of an example depends on the padding beside it" in refused.err


def test_what_cannot_be_packed_is_trained_padded_and_says_so(place: Path) -> None:
    config = {"model_type": "mpnet", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"intermediate_size": 32, "max_position_embeddings": 34}
    recipe = write_recipe_in(place, "mpnet.yaml", model={"from_config": config}, training={"max_steps": 2})
    outcome = run_trainer(recipe, place / "mpnet")
    assert outcome.code == 0, outcome.err
    note = "note: a mpnet classifier is trained padded: packed, its attention is its own"
    assert outcome.err.count(note) == 1
    assert outcome.json("run.json")["layout"] == "padded"
    assert "is trained padded" not in run_trainer(recipe, place / "mpnet-padded", "--layout", "padded").err
    refused = run_trainer(recipe, place / "mpnet-packed", "--layout", "packed")
    assert refused.code == 2
    assert "error: --layout packed: a mpnet classifier cannot be packed (its attention is its own)" in refused.err
    assert "Traceback" not in refused.err


@pytest.mark.launch
def test_a_compile_backend_changes_nothing(place: Path, whole: Outcome) -> None:
    """Dynamo's own wrapper stays out of the names of what is saved, and a run goes on with it or without."""
    environment = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_DYNAMO_BACKEND": "EAGER"}
    command = [sys.executable, "-m", "accel_trainer.train", "whole.yaml", "--output_dir", "compiled"]
    stopped = start([*command, "--stop_after", "3"], place, **environment)
    assert stopped.code == 75, stopped.err
    compiled = Outcome(0, place / "compiled", "", "")
    assert compiled.json("run.json")["hardware"]["dynamo_backend"] == "EAGER"
    resumed = run_trainer(place / "whole.yaml", compiled.folder, "--resume")
    assert resumed.code == 0, resumed.err
    np.testing.assert_allclose(resumed.losses, whole.losses, rtol=2e-6)
    assert set(resumed.weights) == set(whole.weights)


def test_gradient_checkpointing_changes_nothing(place: Path, plain: Outcome) -> None:
    outcome = run_trainer(place / "plain.yaml", place / "recomputed", "--gradient_checkpointing")
    assert outcome.code == 0, outcome.err
    np.testing.assert_allclose(outcome.losses, plain.losses, rtol=0, atol=1e-6)


def test_gradient_checkpointing_replays_dropout(place: Path, whole: Outcome) -> None:
    outcome = run_trainer(place / "whole.yaml", place / "replayed", "--gradient_checkpointing")
    assert outcome.code == 0, outcome.err
    np.testing.assert_allclose(outcome.losses, whole.losses, rtol=0, atol=1e-6)


def test_gradient_checkpointing_where_the_family_has_none(place: Path) -> None:
    config = {"model_type": "albert", "hidden_size": 16, "embedding_size": 8, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16}
    recipe = write_recipe_in(place, "albert.yaml", model={"from_config": config}, training={"max_steps": 1})
    outcome = run_trainer(recipe, place / "albert", "--gradient_checkpointing")
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert "--gradient_checkpointing" in outcome.err
    assert run_trainer(recipe, place / "albert").code == 0


def test_label_smoothing_is_for_training_only(place: Path, plain: Outcome) -> None:
    outcome = run_trainer(place / "plain.yaml", place / "smooth", "training.label_smoothing_factor=0.5")
    assert outcome.losses != plain.losses
    rows = [json.loads(line) for line in (outcome.folder / "predictions/test.jsonl").read_text("utf-8").splitlines()]
    loss = -np.mean([math.log(row["probabilities"][row["label"]]) for row in rows])
    assert outcome.json("results.json")["test"]["loss"] == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("optim", ["adafactor", "sgd"])
def test_other_optimizers_resume_too(place: Path, optim: str) -> None:
    recipe = write_recipe_in(
        place, f"{optim}.yaml", training={"optim": optim}, saving={"save_strategy": "steps", "save_steps": 3}
    )
    outcome = run_trainer(recipe, place / f"{optim}-whole")
    assert outcome.code == 0, outcome.err
    shutil.copytree(outcome.folder, place / f"{optim}-resumed")
    for step in (6, 8):
        shutil.rmtree(place / f"{optim}-resumed" / "checkpoints" / f"checkpoint-{step}")
    resumed = run_trainer(recipe, place / f"{optim}-resumed", "--resume")
    assert "step 3 of 8" in resumed.err
    assert resumed.lines == outcome.lines
    assert same_weights(resumed, outcome)


def test_a_test_split_for_prediction_only(place: Path) -> None:
    data = place / "unlabelled"
    data.mkdir()
    write_csv(data / "train.csv", reviews(40))
    write_csv(data / "test.csv", [(text, "") for text, _ in reviews(5, seed=9)])
    recipe = write_recipe_in(
        place,
        "unlabelled.yaml",
        dataset={"path": str(data), "splits": {"train": "train", "test": "test"}},
        training={"max_steps": 2},
        evaluation={"metrics": ["accuracy"]},
    )
    outcome = run_trainer(recipe, place / "prediction-only")
    assert outcome.code == 0, outcome.err
    assert set(outcome.json("results.json")) == {"train"}
    text = (outcome.folder / "predictions" / "test.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 5
    assert all(row["label"] is None and row["prediction"] in ("negative", "positive") for row in rows)


def test_text_pairs(place: Path) -> None:
    rows = [(a, b, label) for (a, label), (b, _) in zip(reviews(60), reviews(60, seed=3), strict=True)]
    write_csv(place / "pairs.csv", rows, ("question", "answer", "label"))
    recipe = write_recipe_in(
        place,
        "pairs.yaml",
        dataset={
            "path": str(place / "pairs.csv"),
            "splits": {"train": 40, "validation": 20},
            "text_column": "question",
            "text_pair_column": "answer",
        },
        training={"max_steps": 2},
    )
    outcome = run_trainer(recipe, place / "pairs")
    assert outcome.code == 0, outcome.err
    first = json.loads((outcome.folder / "predictions/validation.jsonl").read_text("utf-8").splitlines()[0])
    assert (first["text"], first["text_pair"]) in {(a, b) for a, b, _ in rows}
    swapped = run_trainer(recipe, place / "swapped", "dataset.text_column=answer", "dataset.text_pair_column=question")
    assert swapped.losses != outcome.losses


def test_starting_from_an_earlier_runs_model(place: Path, whole: Outcome) -> None:
    recipe = write_recipe_in(
        place,
        "second.yaml",
        model={"checkpoint": str(whole.folder / "model"), "from_config": None, "train_tokenizer": None},
        training={"max_steps": 1, "learning_rate": 1e-12},
    )
    outcome = run_trainer(recipe, place / "second")
    assert outcome.code == 0, outcome.err
    assert outcome.json("run.json")["tokenizer_sha256"] == whole.json("run.json")["tokenizer_sha256"]
    second, first = outcome.json("results.json"), whole.json("results.json")
    assert second["validation"]["loss"] == pytest.approx(first["validation"]["loss"], abs=1e-6)
    card = (outcome.folder / "model" / "README.md").read_text(encoding="utf-8")
    assert str(place) not in card


# --- mistakes and failures


def test_a_folder_with_another_run(place: Path, whole: Outcome) -> None:
    before = {path: path.read_bytes() for path in whole.folder.rglob("*") if path.is_file()}
    outcome = run_trainer(place / "whole.yaml", whole.folder)
    assert outcome.code == 2
    assert "a run lies there already (done)" in outcome.err
    assert {path: path.read_bytes() for path in whole.folder.rglob("*") if path.is_file()} == before


MISTAKES: dict[str, tuple[list[str], str]] = {
    "key": (["training.learning_rat=1"], "training.learning_rat"),
    "value": (["training.learning_rate=fast"], "training.learning_rate"),
    "data": (["dataset.path=/nowhere/x.csv"], "/nowhere/x.csv"),
    "column": (["dataset.text_column=review"], "review"),
    "labels": (["dataset.labels=[a, b]"], "is none of a, b"),
    "length": (["dataset.max_length=17"], "dataset.max_length: 17 tokens, but the model has 16 positions"),
    "layers": (["model.freeze_layers=3"], "model.freeze_layers: 3"),
    "shares": (["dataset.splits.train=80"], "dataset.splits"),
    "checkpoint": (
        ["model.from_config=null", "model.train_tokenizer=null", "model.checkpoint=/nowhere/bert"],
        "/nowhere/bert",
    ),
}


def test_old_spellings_are_told(place: Path) -> None:
    recipe = write_recipe_in(place, "old.yaml", training={"num_train_epochs": None, "num_epochs": 0.5})
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    del values["training"]["num_train_epochs"]
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    outcome = run_trainer(recipe, place / "old", "training.lr=0.002", "training.optim=adamw_hf")
    assert outcome.code == 0, outcome.err
    for said in (
        "training.num_epochs is read as training.num_train_epochs",
        "command line: training.lr is read as training.learning_rate",
        "command line: training.optim: adamw_hf is read as adamw_torch",
    ):
        assert outcome.err.count(said) == 1
    assert "is read as" not in outcome.out


@pytest.mark.parametrize("tokens", [0, -1])
def test_a_budget_is_positive(place: Path, plain: Outcome, tokens: int) -> None:
    outcome = run_trainer(place / "plain.yaml", place / f"budget{tokens}", f"--max_tokens_per_device={tokens}")
    assert outcome.code == 2
    assert f"error: --max_tokens_per_device {tokens}: give a positive number of tokens" in outcome.err
    assert outcome.json("status.json")["state"] == "failed"


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_message(place: Path, plain: Outcome, kind: str) -> None:
    overrides, said = MISTAKES[kind]
    outcome = run_trainer(place / "plain.yaml", place / f"mistake-{kind}", *overrides)
    assert outcome.code == 2, outcome.err
    assert said in outcome.err
    assert outcome.err.count("error: ") == 1
    assert "Traceback" not in outcome.err + outcome.out
    status = outcome.json("status.json")
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 2, 0)
    assert said in status["reason"]
    mended = run_trainer(place / "plain.yaml", place / f"mistake-{kind}", "training.max_steps=1")
    assert mended.code == 0, "a folder in which only a mistake was made is free"


def test_no_such_recipe(place: Path) -> None:
    outcome = run_trainer(place / "none.yaml", place / "no-recipe")
    assert outcome.code == 2
    assert "no such recipe" in outcome.err


def test_a_loss_that_is_not_finite(place: Path, plain: Outcome) -> None:
    outcome = run_trainer(
        place / "plain.yaml", place / "nan", "training.optim=sgd", "training.learning_rate=1e30",
        "training.max_grad_norm=null", "saving.save_strategy=steps", "saving.save_steps=1",
    )  # fmt: skip
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    status = outcome.json("status.json")
    assert status["state"] == "failed"
    assert f"the loss or the gradient of step {status['step'] + 1} is not finite" in outcome.err
    assert outcome.checkpoints() == [f"checkpoint-{step}" for step in range(1, status["step"] + 1)]


def test_a_gradient_that_is_not_finite(place: Path, whole: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss is a number still; its weights are none any more, and must not be saved or called best."""
    from accel_trainer import train

    calls, losses_of = 0, train.example_losses

    def poisoned(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        losses, calls = losses_of(*arguments), calls + 1
        if calls == 4:
            losses.register_hook(lambda gradient: gradient * float("nan"))
        return losses

    folder = place / "nan-gradient"
    with monkeypatch.context() as patch:
        patch.setattr(train, "example_losses", poisoned)
        outcome = run_trainer(place / "whole.yaml", folder)
    assert outcome.code == 1
    assert "the loss or the gradient of step 4 is not finite" in outcome.err
    assert outcome.checkpoints() == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert [line["step"] for line in outcome.lines] == [1, 1, 2, 2, 3, 3]
    resumed = run_trainer(place / "whole.yaml", folder, "--resume")
    assert resumed.lines == whole.lines
    assert same_weights(resumed, whole)


def test_a_crash_is_told_in_full(place: Path, plain: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("accel_trainer.train.example_losses", broken)
    outcome = run_trainer(place / "plain.yaml", place / "crash")
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    status = outcome.json("status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert "no such kernel" in status["reason"]


def test_a_full_disk_keeps_what_was_saved(place: Path, whole: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    from accel_trainer import checkpoint

    save: Callable[..., None] = checkpoint.save_file

    def filling(tensors: Any, path: Path, **keywords: Any) -> None:
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", filling)
        outcome = run_trainer(place / "whole.yaml", place / "full")
    assert outcome.code == 2
    assert "No space left on device" in outcome.err
    assert outcome.checkpoints() == [f"checkpoint-{step}" for step in (1, 2, 3)]
    assert outcome.json("status.json")["state"] == "failed"
    resumed = run_trainer(place / "whole.yaml", place / "full", "--resume")
    assert resumed.code == 0, resumed.err
    assert resumed.lines == whole.lines


def test_a_fresh_process_gives_the_same_weights(place: Path, whole: Outcome) -> None:
    code = "import sys; from accel_trainer.train import main; sys.exit(main(sys.argv[1:]))"
    done = python(code, place, "whole.yaml", "--output_dir", "fresh", PYTHONHASHSEED="7", ACCELERATE_USE_CPU="true")
    assert done.code == 0, done.err
    fresh = Outcome(0, place / "fresh", "", "")
    assert fresh.lines == whole.lines
    assert same_weights(fresh, whole)

"""Durations become steps once, exactly, and the moments of a run follow from them."""

from __future__ import annotations

import json
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_trainer.plan import TrainingPlan
from accel_trainer.recipe import Recipe


def plan_of(num_examples=100, *, validation: bool = True, **sections) -> TrainingPlan:
    """The plan of a small recipe; 100 examples in batches of 10 are 10 steps an epoch."""
    training = {"global_batch_size": 10, "learning_rate": 1e-3} | sections.pop("training", {})
    if "max_steps" not in training:
        training.setdefault("num_train_epochs", 1)
    splits = {"train": "train"} | ({"validation": "test"} if validation else {})
    values = {"dataset": {"path": "x.csv", "splits": splits}, "model": {"checkpoint": "c"}, "training": training}
    return TrainingPlan.of(Recipe.model_validate(values | sections), num_examples)


@pytest.mark.parametrize(
    ("examples", "batch", "epochs", "steps"),
    [
        (100, 10, 1, 10),
        (101, 10, 1, 11),
        (101, 10, 2, 22),
        (99, 10, 3, 30),
        (5, 10, 1, 1),
        (100, 10, 0.5, 5),
        (100, 10, 0.25, 3),
        (100, 10, 1e-5, 1),
        (300, 10, 0.1, 3),
        (1000, 10, 1.1, 110),  # 1.1 × 100 is 110.00000000000001 in binary
    ],
)
def test_epochs_become_steps(examples, batch, epochs, steps):
    plan = plan_of(examples, training={"global_batch_size": batch, "num_train_epochs": epochs})
    assert plan.total_steps == steps
    assert plan.steps_per_epoch == -(-examples // batch)


@given(st.integers(1, 10**6), st.integers(1, 512), st.decimals("0.01", "20", places=2))
def test_any_share_of_an_epoch_is_exact(examples, batch, epochs):
    plan = plan_of(examples, training={"global_batch_size": batch, "num_train_epochs": float(epochs)})
    assert plan.total_steps == ceil(Fraction(str(epochs)) * (-(-examples // batch)))


def test_max_steps_wins_over_epochs():
    assert plan_of(training={"max_steps": 7, "num_train_epochs": 100}).total_steps == 7
    assert plan_of(training={"max_steps": 70}).total_steps == 70


@pytest.mark.parametrize(
    ("warmup", "total", "steps"),
    [
        (0, 30, 0),
        (1, 30, 1),
        (5, 30, 5),
        (5.0, 30, 5),
        (0.1, 30, 3),
        (0.07, 100, 7),  # 0.07 × 100 is 7.000000000000001 in binary
        (0.1, 31, 4),
        (0.5, 30, 15),
        (0.999, 10, 10),
        (1e-6, 10, 1),
    ],
)
def test_warmup_is_steps_or_a_share_of_the_run(warmup, total, steps):
    assert plan_of(training={"max_steps": total, "warmup_steps": warmup}).warmup_steps == steps


def moments(plan, ask):
    return [step for step in range(1, plan.total_steps + 1) if ask(step)]


def test_evaluations_by_steps_by_epochs_and_never():
    def evaluations(**evaluation):
        plan = plan_of(training={"max_steps": 25}, evaluation=evaluation, tracking={"logging_steps": 9})
        return moments(plan, plan.evaluates_at)

    assert evaluations(eval_strategy="steps", eval_steps=10) == [10, 20, 25]
    assert evaluations(eval_strategy="steps", eval_steps=5) == [5, 10, 15, 20, 25]
    assert evaluations(eval_strategy="steps") == [9, 18, 25]  # as often as it is logged
    assert evaluations(eval_strategy="steps", eval_steps=100) == [25]
    assert evaluations(eval_strategy="epoch") == [10, 20, 25]
    assert evaluations(eval_strategy="no") == []


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_without_a_validation_split_nothing_is_evaluated(strategy):
    plan = plan_of(validation=False, evaluation={"eval_strategy": strategy})
    assert plan.eval_every is None
    assert moments(plan, plan.evaluates_at) == []


def test_checkpoints_by_steps_by_epochs_and_never():
    def saves(**saving):
        plan = plan_of(training={"max_steps": 25}, saving=saving)
        return moments(plan, plan.saves_at)

    assert saves(save_strategy="steps", save_steps=10) == [10, 20, 25]
    assert saves(save_strategy="steps", save_steps=25) == [25]
    assert saves(save_strategy="epoch") == [10, 20, 25]
    assert saves(save_strategy="no") == []


def test_lines_are_logged_at_their_multiples_and_at_the_end():
    plan = plan_of(training={"max_steps": 25}, tracking={"logging_steps": 10})
    assert moments(plan, plan.logs_at) == [10, 20, 25]
    assert moments(plan_of(tracking={"logging_steps": 1}), plan_of(tracking={"logging_steps": 1}).logs_at) == [
        *range(1, 11)
    ]


@given(st.integers(1, 1000), st.integers(1, 100))
def test_the_epoch_counts_examples(examples, batch):
    plan = plan_of(examples, training={"global_batch_size": batch, "num_train_epochs": 3})
    seen = 0
    for step in range(1, plan.total_steps + 1):
        left = examples - seen % examples
        seen += min(batch, left)
        assert plan.epoch(step) == pytest.approx(seen / examples)
    assert plan.epoch(0) == 0
    assert plan.epoch(plan.total_steps) == 3


def test_the_plan_is_plain_data():
    assert json.loads(json.dumps(plan_of().as_dict())) == {
        "num_examples": 100,
        "global_batch_size": 10,
        "steps_per_epoch": 10,
        "total_steps": 10,
        "warmup_steps": 0,
        "logging_steps": 10,
        "eval_every": 10,
        "save_every": 10,
    }

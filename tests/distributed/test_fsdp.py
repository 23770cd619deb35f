"""Two real processes on the CPU, each with a share of weights, gradients and optimizer, take the steps of one."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import ROOT, Outcome, run_trainer, start, write_recipe_in
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.launch

LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
TRAINER = str(ROOT / "tests" / "distributed" / "sharded_train.py")
SHARDED = [*LAUNCHER, str(ROOT / "accelerate_configs" / "fsdp.yaml")]
WHOLE = [*LAUNCHER, str(ROOT / "accelerate_configs" / "multi_cpu.yaml"), "-m", "accel_trainer.train"]
FILES = ("model.safetensors", "optimizer.safetensors")
# 57 = 7 · 8 + 1: in the last batch one process has nothing but a filler. 21 evaluation rows are not divisible by two.
SPLITS = {"splits": {"train": 57, "validation": 21, "test": 11}}
STEPS: dict[str, Any] = {"num_train_epochs": None, "max_steps": 16}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 3}
SAVING = {"save_strategy": "steps", "save_steps": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fsdp")
    # Plain gradient descent without a bound: a gradient of the wrong size shows in the next loss. Adam would hide it.
    plain = {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": None, **STEPS}
    unsaved = {"save_strategy": "no"}  # a checkpoint would put shares back by itself
    write_recipe_in(place, "plain.yaml", dataset=SPLITS, training=plain, evaluation=EVALUATION, saving=unsaved)
    adam = {"max_grad_norm": 0.5, "weight_decay": 0.01, **STEPS}
    write_recipe_in(place, "adam.yaml", dataset=SPLITS, training=adam, evaluation=EVALUATION, saving=SAVING)
    deeper = {**adam, "layerwise_lr_decay": 0.8, "max_steps": 8}
    write_recipe_in(place, "frozen.yaml", dataset=SPLITS, model={"freeze_layers": 1}, training=deeper)
    return place


@pytest.fixture(scope="module")
def one(place: Path) -> Outcome:
    return alone(place, "adam.yaml", "one")


def alone(place: Path, recipe: str, name: str, *arguments: str) -> Outcome:
    outcome = run_trainer(place / recipe, place / name, *arguments)
    assert outcome.code == 0, outcome.err
    return outcome


def sharded(place: Path, recipe: str, name: str, *arguments: str, precision: str = "no", code: int = 0) -> Outcome:
    command = [*SHARDED, "--mixed_precision", precision, TRAINER, recipe, "--output_dir", name, *arguments]
    done = start(command, place)
    assert done.code == code, done.err
    return Outcome(done.code, place / name, done.out, done.err)


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        if not re.search(r"key\.bias( |$)", name):  # whose true gradient is zero: AdamW divides noise by noise
            np.testing.assert_allclose(found[name], tensor, rtol=0, atol=tolerance)


def check_same(
    run: Outcome, one: Outcome, loss: float = 2e-6, norm: float = 2e-5, score: float = 1e-6, weights: float = 1e-6
) -> None:
    """That two runs took the same steps, and left the same, to tolerances: two relative, two absolute."""
    check_close(run.weights, one.weights, weights)
    assert [line["step"] for line in run.steps] == [line["step"] for line in one.steps]
    for key, tolerance in (("loss", loss), ("grad_norm", norm), ("learning_rate", 0), ("tokens", 0)):
        found, expected = [[line[key] for line in outcome.steps] for outcome in (run, one)]
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=0)
    for found, expected in zip(run.evaluations, one.evaluations, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=score)
    for split in ("validation", "test"):
        found, expected = (outcome.json("results.json")[split]["loss"] for outcome in (run, one))
        assert found == pytest.approx(expected, abs=score)
    for key in ("steps", "examples", "tokens", "best_step"):
        assert run.json("results.json")["train"][key] == one.json("results.json")["train"][key]


def check_same_files(run: Outcome, one: Outcome) -> None:
    """That the last checkpoints hold the same tensors, whole and in float32."""
    for file in FILES:
        check_close(*(load_file(outcome.folder / "checkpoints" / "checkpoint-16" / file) for outcome in (run, one)))


def check_held(run: Outcome, averages: int) -> None:
    """That each process ended with half of the weights, and half of the optimizer's averages of each."""
    held = re.findall(r"HELD \d: (\d+) parts, weights (\d+)/(\d+), optimizer (\d+)/(\d+)", run.err)
    assert len(held) == 2
    for parts, weights, all_weights, state, all_state in held:
        assert parts == "3"  # two layers, and all else
        assert int(weights) / int(all_weights) == pytest.approx(0.5, abs=0.02)
        assert int(all_state) == averages * int(all_weights)
        assert int(state) == averages * int(weights)


def test_shares_take_the_steps_of_one(place: Path) -> None:
    one = alone(place, "plain.yaml", "plain-one")
    two = sharded(place, "plain.yaml", "plain", "--max_tokens_per_device", "40")
    check_same(two, one)
    names = [{str(path.relative_to(run.folder)) for path in run.folder.rglob("*")} for run in (two, one)]
    assert names[0] == names[1]
    facts = two.json("run.json")
    assert (facts["hardware"]["distributed_type"], facts["hardware"]["num_processes"]) == ("FSDP", 2)
    for key in ("initial_weights_sha256", "parameters"):
        assert facts[key] == one.json("run.json")[key]
    assert one.json("results.json")["train"]["best_step"] < 16  # the best weights were put back into shares
    check_held(two, averages=0)  # though an evaluation came last
    assert two.err.count("step 1/16") == 1
    assert two.out.count("confusion matrix") == 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_clipping_and_adam_in_several_micro_batches(place: Path, one: Outcome, checkpointing: bool) -> None:
    options = ["--gradient_checkpointing"] if checkpointing else []
    two = sharded(place, "adam.yaml", f"adam-{checkpointing}", "--max_tokens_per_device", "30", *options)
    check_same(two, one)
    check_same_files(two, one)
    assert max(line["grad_norm"] for line in two.steps) > 0.5  # the bound was met
    check_held(two, averages=2)


def test_frozen_layers_and_rates_by_layer(place: Path) -> None:
    one = alone(place, "frozen.yaml", "frozen-one")
    check_same(sharded(place, "frozen.yaml", "frozen"), one)


def test_half_precision_keeps_shares_whole(place: Path, one: Outcome) -> None:
    """bf16 has 8 bits: what is computed is near, and what is kept has all 24."""
    half = sharded(place, "adam.yaml", "half", precision="bf16")
    check_same(half, one, loss=2e-3, norm=5e-2, score=2e-3, weights=2e-2)
    assert half.losses != one.losses
    last = half.folder / "checkpoints" / "checkpoint-16"
    for file in FILES:
        for name, tensor in load_file(last / file).items():
            assert str(tensor.dtype) == "torch.float32", name
    weights = load_file(last / "model.safetensors")
    assert any((weight != weight.bfloat16().float()).any() for weight in weights.values())


@pytest.fixture(scope="module")
def stopped(place: Path) -> Outcome:
    outcome = sharded(place, "adam.yaml", "stopped", "--stop_after", "7", code=1)  # the launcher's, for 75
    assert outcome.json("status.json")["exit_code"] == 75
    return outcome


def test_stopped_and_resumed_to_the_same_bits(place: Path, stopped: Outcome) -> None:
    whole = sharded(place, "adam.yaml", "whole")
    shutil.copytree(stopped.folder, place / "resumed")
    resumed = sharded(place, "adam.yaml", "resumed", "--resume")
    assert "step 7 of 16" in resumed.err
    assert resumed.lines == whole.lines
    assert resumed.weights_sha256 == whole.weights_sha256
    for file in FILES:
        last = Path("checkpoints") / "checkpoint-16" / file
        assert (resumed.folder / last).read_bytes() == (whole.folder / last).read_bytes()


def test_shares_go_on_as_one_process_and_as_two_whole_ones(place: Path, one: Outcome, stopped: Outcome) -> None:
    for name in ("to-one", "to-ddp"):
        shutil.copytree(stopped.folder, place / name)
    check_same(alone(place, "adam.yaml", "to-one", "--resume"), one)
    done = start([*WHOLE, "adam.yaml", "--output_dir", "to-ddp", "--resume"], place)
    assert done.code == 0, done.err
    check_same(Outcome(0, place / "to-ddp", done.out, done.err), one)


@pytest.mark.parametrize("processes", [1, 2])
def test_whole_ones_go_on_in_shares(place: Path, one: Outcome, processes: int) -> None:
    name = f"from-{processes}"
    options = ["--num_processes", str(processes), "-m", "accel_trainer.train", "adam.yaml", "--stop_after", "7"]
    config = "cpu" if processes == 1 else "multi_cpu"
    launch = [*LAUNCHER, str(ROOT / "accelerate_configs" / f"{config}.yaml"), *options, "--output_dir", name]
    start(launch, place)
    two = sharded(place, "adam.yaml", name, "--resume")
    assert "step 7 of 16" in two.err
    check_same(two, one)
    check_same_files(two, one)


def test_what_cannot_be_in_shares_ends_with_one_message(place: Path) -> None:
    ended = sharded(place, "adam.yaml", "adafactor", "training.optim=adafactor", code=1)
    assert ended.json("status.json")["exit_code"] == 2
    (message,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert "training.optim: adafactor" in message


def test_a_dry_run_in_shares(place: Path) -> None:
    ended = sharded(place, "adam.yaml", "rehearsed", "--dry_run")
    assert "all of it works" in ended.out
    assert list(place.glob("rehearsed*")) == []

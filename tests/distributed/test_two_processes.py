"""Two real processes on the CPU take the same steps as one, leave one set of files, and end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from harness import ROOT, Outcome, python, run_trainer, start, user_environment, write_recipe_in

pytestmark = pytest.mark.launch

CONFIG = ROOT / "accelerate_configs" / "multi_cpu.yaml"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG), "-m", "accel_trainer.train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# 57 = 7 · 8 + 1: in the last batch one process has nothing but a filler. 21 evaluation rows are not divisible by two.
SPLITS = {"splits": {"train": 57, "validation": 21, "test": 11}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("two")
    # Plain gradient descent without a bound: a gradient of the wrong size shows in the next loss. Adam would hide it.
    write_recipe_in(
        place,
        dataset=SPLITS,
        training={
            "optim": "sgd",
            "learning_rate": 0.3,
            "max_grad_norm": None,
            "num_train_epochs": None,
            "max_steps": 50,
        },
        evaluation={"eval_strategy": "steps", "eval_steps": 10},
    )
    write_recipe_in(place, "dropout.yaml", dataset=SPLITS, saving={"save_strategy": "steps", "save_steps": 4})
    return place


@pytest.fixture(scope="module")
def one(place: Path) -> Outcome:
    outcome = run_trainer(place / "tiny.yaml", place / "one")
    assert outcome.code == 0, outcome.err
    return outcome


def launch(command: list[str], place: Path, recipe: str, name: str, *arguments: str) -> Outcome:
    done = start([*command, recipe, "--output_dir", name, *arguments], place)
    return Outcome(done.code, place / name, done.out, done.err)


def check_equal(two: Outcome, one: Outcome) -> None:
    """Of 50 steps, evaluations and predictions. Prints the largest differences, which `pytest -rP` shows."""
    assert [line["step"] for line in two.lines] == [line["step"] for line in one.lines]
    assert len(one.losses) == 50
    for key, tolerance in (("loss", 2e-6), ("grad_norm", 2e-5), ("learning_rate", 0), ("tokens", 0)):
        found, expected = [[line[key] for line in run.steps] for run in (two, one)]
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=0)
        print(f"{key}: largest relative difference in 50 steps {np.max(np.abs(np.divide(found, expected) - 1)):.1e}")
    for found, expected in zip(two.evaluations, one.evaluations, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    for split in ("validation", "test"):
        ours, theirs = two.json("results.json")[split], one.json("results.json")[split]
        assert ours["confusion_matrix"] == theirs["confusion_matrix"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        rows = [
            [json.loads(line) for line in (run.folder / f"predictions/{split}.jsonl").read_text("utf-8").splitlines()]
            for run in (two, one)
        ]
        assert [row["text"] for row in rows[0]] == [row["text"] for row in rows[1]]
        found, expected = [np.array([[*row["probabilities"].values()] for row in run]) for run in rows]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        print(f"probabilities of {split}: largest difference {np.max(np.abs(found - expected)):.1e}")
    for key in ("steps", "examples", "tokens", "best_step"):
        assert two.json("results.json")["train"][key] == one.json("results.json")["train"][key]


def test_two_processes_take_the_steps_of_one(place: Path, one: Outcome) -> None:
    two = launch(LAUNCH, place, "tiny.yaml", "two", "--max_tokens_per_device", "40")
    assert two.code == 0, two.err
    check_equal(two, one)
    facts = two.json("run.json")
    assert facts["hardware"]["num_processes"] == 2
    assert facts["initial_weights_sha256"] == one.json("run.json")["initial_weights_sha256"]
    names = [{str(path.relative_to(run.folder)) for path in run.folder.rglob("*")} for run in (two, one)]
    assert names[0] == names[1]
    assert two.err.count("step 1/50") == 1
    assert two.out.count("confusion matrix") == 2  # validation and test, each once


def test_torchrun_does_as_well(place: Path, one: Outcome) -> None:
    two = launch([*TORCHRUN, "-m", "accel_trainer.train"], place, "tiny.yaml", "torchrun")
    assert two.code == 0, two.err
    assert two.json("run.json")["hardware"]["num_processes"] == 2
    check_equal(two, one)


def test_resume_with_two_processes_is_bitwise_and_sigterm_saves(place: Path) -> None:
    whole = launch(LAUNCH, place, "dropout.yaml", "whole")
    assert whole.code == 0, whole.err
    shutil.copytree(whole.folder, place / "resumed")
    for name in ("checkpoints/checkpoint-8", "model", "best"):
        shutil.rmtree(place / "resumed" / name)
    resumed = launch(LAUNCH, place, "dropout.yaml", "resumed", "--resume")
    assert resumed.code == 0, resumed.err
    assert "step 4 of 8" in resumed.err
    assert resumed.lines == whole.lines
    assert resumed.weights_sha256 == whole.weights_sha256
    for file in ("model.safetensors", "optimizer.safetensors"):
        last = Path("checkpoints") / "checkpoint-8" / file
        assert (resumed.folder / last).read_bytes() == (whole.folder / last).read_bytes()
    alone = run_trainer(place / "dropout.yaml", place / "resumed", "--resume")  # on another number of processes
    assert alone.code == 0, alone.err
    assert alone.json("results.json")["validation"]["loss"] == pytest.approx(
        whole.json("results.json")["validation"]["loss"], abs=1e-5
    )


def interrupt(place: Path, name: str, number: signal.Signals, *, whole_group: bool) -> dict[str, object]:
    """Start a long run, send a signal to its launcher, or to all of them as a terminal does; what status.json says."""
    process = subprocess.Popen(
        [*LAUNCH, "dropout.yaml", "training.max_steps=100000", "--output_dir", name],
        cwd=place,
        env=user_environment(place),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        metrics, deadline = place / name / "metrics.jsonl", time.monotonic() + 60
        while not metrics.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
        assert metrics.exists()
        (os.killpg if whole_group else os.kill)(process.pid, number)
        process.wait(timeout=45)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    status: dict[str, object] = json.loads((place / name / "status.json").read_text())
    return status


@pytest.mark.parametrize(
    ("number", "whole_group"), [(signal.SIGTERM, False), (signal.SIGINT, True)], ids=["scheduler", "terminal"]
)
def test_a_signal_saves_on_both(place: Path, number: signal.Signals, whole_group: bool) -> None:
    name = f"stopped-{number}"
    status = interrupt(place, name, number, whole_group=whole_group)
    assert (status["state"], status["exit_code"]) == ("interrupted", 75)
    saved = sorted(path.name for path in (place / name / "checkpoints").iterdir())
    assert f"checkpoint-{status['step']}" in saved


def test_a_mistake_ends_both_quickly_with_one_message(place: Path) -> None:
    started = time.monotonic()
    outcome = launch(LAUNCH, place, "tiny.yaml", "mistake", "dataset.text_column=review")
    assert time.monotonic() - started < 60
    assert outcome.code != 0
    assert outcome.err.count("error: ") == 1
    (message,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert "review" in message
    assert outcome.json("status.json")["exit_code"] == 2


def test_processes_that_would_ignore_each_other_stop(place: Path) -> None:
    """As on a machine with an accelerator whose config says one process: nobody tells Accelerate about the others."""
    code = (
        "import sys, torch; from accel_trainer import train\n"
        "torch.accelerator.is_available = lambda *_, **__: True\n"
        "sys.exit(train.main(sys.argv[1:]))"
    )
    done = python(code, place, "tiny.yaml", "--output_dir", "ignoring", WORLD_SIZE="2", RANK="0")
    assert done.code == 2
    assert "the launcher started 2 processes (WORLD_SIZE), but Accelerate runs 1" in done.err
    assert "Traceback" not in done.err
    assert not (place / "ignoring" / "metrics.jsonl").exists()


def test_a_dry_run_of_two_processes(place: Path) -> None:
    ended = launch(LAUNCH, place, "dropout.yaml", "rehearsed", "--dry_run")
    assert ended.code == 0, ended.err
    assert "2 processes" in ended.err
    assert "all of it works" in ended.out
    assert list(place.glob("rehearsed*")) == []

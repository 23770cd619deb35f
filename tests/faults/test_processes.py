"""Real processes that are signalled, killed, stopped and started twice: what is saved, what is said, what goes on."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from harness import Outcome, run_trainer, write_recipe_in
from processes import Launched, kill, launcher, torchrun

from accel_trainer.checkpoint import newest_sound
from accel_trainer.run_folder import RunFolder

pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(sys.platform != "linux", reason="watches processes through /proc"),
]

LAST = 40  # step that runs are compared up to
RECIPE: dict[str, Any] = {
    "training": {"num_train_epochs": None, "max_steps": 100_000},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 10},
    "saving": {"save_strategy": "steps", "save_steps": 10, "save_total_limit": 2},
}
TERM, INT, HUP, KILL, STOP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL, signal.SIGSTOP


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("processes")
    write_recipe_in(place, "long.yaml", **RECIPE)
    return place


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Outcome:
    """The first steps, by one process that nobody disturbs."""
    outcome = run_trainer(place / "long.yaml", place / "undisturbed", "--stop_after", str(LAST))
    assert outcome.code == 75, outcome.err
    return outcome


def check_goes_on(run: Launched, undisturbed: Outcome, processes: int) -> None:
    """Resumed by one process, it takes the steps of the undisturbed run, which saw every evaluation once."""
    resumed = run_trainer(run.folder.parent / "long.yaml", run.folder, "--resume", "--stop_after", str(LAST))
    assert resumed.code == 75, resumed.err
    if processes > 1:
        check_alike(resumed, undisturbed)
        return
    assert resumed.lines == undisturbed.lines
    last = f"checkpoints/checkpoint-{LAST}/model.safetensors"
    assert (resumed.folder / last).read_bytes() == (undisturbed.folder / last).read_bytes()


def check_alike(outcome: Outcome, undisturbed: Outcome) -> None:
    """The same lines, but for rounding."""
    assert [line["step"] for line in outcome.lines] == [line["step"] for line in undisturbed.lines]
    assert outcome.losses == pytest.approx(undisturbed.losses, rel=1e-5)


def check_interrupted(run: Launched) -> dict[str, Any]:
    status = run.status()
    assert (status["state"], status["exit_code"]) == ("interrupted", 75), run.said
    path, complaints = newest_sound(run.folder / "checkpoints")
    assert path == run.folder / "checkpoints" / f"checkpoint-{status['step']}"
    assert not complaints
    assert f"interrupted after step {status['step']} of 100000; continue with --resume" in run.said
    assert "accel_trainer/" not in run.said  # no traceback of ours
    return status


@pytest.mark.parametrize(("target", "number"), [("launcher", TERM), ("launcher", KILL), ("trainer", HUP)])
def test_one_process(place: Path, undisturbed: Outcome, target: str, number: signal.Signals) -> None:
    """A launcher of one process forwards nothing: its death is the signal, and nothing outlives it."""
    with Launched(launcher(1), place, "long.yaml", f"one-{target}-{number}", module="slow_train", SLOW="steps") as run:
        run.wait_for_step(3)
        kill(run.process.pid if target == "launcher" else run.trainers()[0], number)
        run.ended()
        assert 3 <= check_interrupted(run)["step"] < LAST
        check_goes_on(run, undisturbed, processes=1)


@pytest.mark.parametrize(
    ("target", "number", "where"),
    [
        (1, TERM, "steps"),
        (0, INT, "evaluation"),
        (1, TERM, "evaluation"),
        (1, INT, "saving"),
        ("launcher", TERM, "saving"),
    ],
)
def test_one_of_two_processes(
    place: Path, undisturbed: Outcome, target: int | str, number: signal.Signals, where: str
) -> None:
    """Whoever is asked, all of them stop after the same step, and one checkpoint is written."""
    name = f"two-{target}-{number}-{where}"
    for old in place.glob("at-*"):
        old.unlink()
    small = ("--max_tokens_per_device", "16")  # an evaluation of several micro-batches
    with Launched(launcher(2), place, "long.yaml", name, *small, module="slow_train", SLOW=where) as run:
        if where == "steps":
            run.wait_for_step(3)
        else:
            run.wait_for(lambda: (place / f"at-{where}-0").exists(), where)
        kill(run.process.pid if target == "launcher" else run.trainers()[int(target)], number)
        run.ended()
        status = check_interrupted(run)
        if where != "steps":  # nothing was done after the signal: no other step, no other checkpoint
            assert status["step"] == 10
            assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["checkpoint-10"]
        evaluated = [
            line for line in map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines()) if "split" in line
        ]
        assert len(evaluated) == (where == "saving")
        check_goes_on(run, undisturbed, processes=2)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_other(place: Path, undisturbed: Outcome, rank: int) -> None:
    with Launched(launcher(2), place, "long.yaml", f"killed-{rank}", module="slow_train", SLOW="steps") as run:
        run.wait_for_step(12)
        kill(run.trainers()[rank], KILL)
        outcome = run.ended()
        assert outcome.code == 1
        assert f"error: process {1 - rank} of 2 lost another one, which died or answers no more" in outcome.err
        assert "run the same line again with --resume" in outcome.err
        assert "accel_trainer/" not in outcome.err
        assert run.status()["state"] == "failed"
        check_goes_on(run, undisturbed, processes=2)


def test_a_process_that_answers_no_more_is_waited_for_as_long_as_was_said(place: Path) -> None:
    with Launched(
        launcher(2), place, "long.yaml", "stopped", "--ddp_timeout", "4", module="slow_train", SLOW="steps"
    ) as run:
        run.wait_for_step(3)
        _, second = run.trainers()
        kill(second, STOP)
        run.wait_for(
            lambda: run.status()["state"] == "failed", "the time-out"
        )  # the launcher waits for half a minute more
        assert "process 0 of 2 lost another one" in run.status()["reason"]
        assert re.search(r"process 0 of 2 lost .* \(Timed out waiting \d+ms", run.status()["reason"])
        kill(second, KILL)
        run.ended()


def test_a_launcher_that_restarts_goes_on_by_itself(place: Path, undisturbed: Outcome) -> None:
    command = torchrun(2, restarts=1)
    with Launched(
        command,
        place,
        "long.yaml",
        "restarted",
        "--resume",
        "--stop_after",
        str(LAST),
        module="slow_train",
        SLOW="steps",
    ) as run:
        run.wait_for_step(12)
        kill(run.trainers()[1], KILL)
        run.wait_for_step(LAST)
        run.ended()
        assert run.status()["state"] == "interrupted"  # by --stop_after
        assert re.search(r"continuing from .*checkpoint-\d+, step \d+ of 100000", run.said)
        check_alike(Outcome(0, run.folder, run.said, run.said), undisturbed)


def test_a_number_that_is_none_on_one_process_stops_both_at_that_step(place: Path) -> None:
    """Logged every fourth step; the loss of the sixth, of process 1, is no number."""
    with Launched(
        launcher(2), place, "long.yaml", "poisoned", "tracking.logging_steps=4", "saving.save_steps=5",
        module="slow_train", POISON="1:6",
    ) as run:  # fmt: skip
        outcome = run.ended()
    assert outcome.code == 1
    assert "the loss or the gradient of step 6 is not finite" in outcome.err
    assert "accel_trainer/" not in outcome.err
    assert run.status()["state"] == "failed"
    assert outcome.checkpoints() == ["checkpoint-5"]
    found = outcome.json("not_finite.json")
    assert found["step"] == 6
    assert len(found["rows"]) == 8
    assert all(set(row) == {"row", "place", "label", "text"} for row in found["rows"])
    texts = {row["text"] for row in found["rows"]}
    assert len(texts) == 8
    assert all(text in (place / "reviews.csv").read_text(encoding="utf-8") for text in texts)
    again = run_trainer(
        place / "long.yaml", outcome.folder, "--resume", "--stop_after", "7", "tracking.logging_steps=4"
    )
    assert again.code == 75, again.err  # healthy again
    assert not (outcome.folder / "not_finite.json").exists()


def test_signals_without_end_do_not_spoil_the_exit_code(place: Path) -> None:
    """A scheduler repeats itself into the last moments of a process."""
    alone = [sys.executable]
    with Launched(
        alone, place, "long.yaml", "storm", module="slow_train", SLOW="steps", ACCELERATE_USE_CPU="true"
    ) as run:
        run.wait_for_step(3)
        while run.process.poll() is None:
            kill(run.process.pid, TERM)
            time.sleep(0.02)
        assert run.process.returncode == 75
        check_interrupted(run)


def test_trackers_are_closed_before_the_launcher_loses_patience(place: Path) -> None:
    """The other process has nothing to close; its end must not cut short what the first one still writes."""
    with Launched(
        launcher(2),
        place,
        "long.yaml",
        "closing",
        "tracking.report_to=[tensorboard]",
        module="slow_train",
        SLOW="closing",
    ) as run:
        run.wait_for_step(2)
        kill(run.trainers()[1], TERM)
        run.ended()
        check_interrupted(run)
        assert (place / "at-closed-0").exists()


def test_two_launches_into_one_folder(place: Path) -> None:
    with Launched(launcher(1), place, "long.yaml", "twice", module="slow_train", SLOW="steps") as run:
        run.wait_for_step(3)
        for more in ([], ["--resume"]):
            began = time.monotonic()
            second = run_trainer(place / "long.yaml", run.folder, *more)
            assert second.code == 2
            assert "another launch is at work in this folder" in second.err
            assert time.monotonic() - began < 60
        before = run.steps()[-1]
        run.wait_for_step(before + 3)  # the first one never noticed
        assert run.status()["state"] == "running"
        kill(run.trainers()[0], TERM)
        run.ended()
        assert run.steps() == sorted(run.steps())
        check_interrupted(run)


def test_killed_again_and_again(place: Path, undisturbed: Outcome) -> None:
    """SIGKILL, three times, to whatever the launch is made of; the soak does it hundreds of times."""
    folder = RunFolder(place / "again")
    for steps, processes in zip((4, 17, 26), itertools.cycle((1, 2)), strict=False):
        with Launched(
            launcher(processes), place, "long.yaml", "again", "--resume", module="slow_train", SLOW="steps"
        ) as run:
            run.wait_for_step(steps)
            for process in [run.process.pid, *run.trainers()]:
                kill(process, KILL)
            run.ended()
            path, _ = newest_sound(folder.checkpoints)
            saved = 0 if path is None else int(path.name.rpartition("-")[2])
            assert run.steps()[-1] - saved <= 10
    check_goes_on(run, undisturbed, processes=2)
    assert not list(folder.path.rglob(".*.writing"))
    assert os.access(folder.path / ".lock", os.F_OK)

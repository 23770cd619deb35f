"""Machines that die and come back, and processes of theirs: torchrun starts the others again, and the run goes on."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import ROOT, Outcome, run_trainer, write_recipe_in
from hosts import ADDRESSES, Host, two_hosts, wait_for

pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED, several machines: network namespaces are Linux's"),
]

TESTS = ROOT / "tests"
PATHS = os.pathsep.join(map(str, (TESTS / "faults", TESTS, ROOT)))


def write(place: Path, steps: int) -> Path:
    return write_recipe_in(
        place,
        training={"num_train_epochs": None, "max_steps": steps},
        evaluation={"eval_strategy": "steps", "eval_steps": 20},
        saving={"save_strategy": "steps", "save_steps": 10, "save_total_limit": 2},
    )


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "first"


def join(host: Host, waiting: str = "", **environment: str) -> None:
    """The line of docs/hardware.md, with time-outs of torchrun's that a test can wait for; steps take a twentieth of a second
    more."""
    conf = f"is_host={1 if host.address == ADDRESSES[0] else 0}{waiting}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-id", "test", "--rdzv-endpoint", f"{ADDRESSES[0]}:29400"]
    more = ["--rdzv-conf", conf, "--local-addr", host.address, "--max-restarts", "3"]
    trainer = ["-m", "slow_train", "tiny.yaml", "--output_dir", "run", "--resume", "--ddp_timeout", "300"]
    host.launch(
        [*torchrun, *meeting, *more, *trainer],
        **{"SLOW": "steps", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": PATHS, **environment},
    )


def last_step(place: Path) -> int:
    """The last step that metrics.jsonl has, a line that is being written left out."""
    try:
        text = (place / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    except OSError:
        return 0
    return max((json.loads(line)["step"] for line in text.splitlines(keepends=True) if line.endswith("\n")), default=0)


def check_like_undisturbed(run: Outcome, place: Path) -> None:
    """Its losses, scores and probabilities are those of one process that nobody disturbed. Prints the largest differences."""
    undisturbed = run_trainer(place / "tiny.yaml", place / "undisturbed")
    assert undisturbed.code == 0, undisturbed.err
    assert [line["step"] for line in run.lines] == [line["step"] for line in undisturbed.lines]
    np.testing.assert_allclose(run.losses, undisturbed.losses, rtol=0, atol=1e-5)
    print(f"losses: largest difference {np.max(np.abs(np.subtract(run.losses, undisturbed.losses))):.1e}")
    for found, expected in zip(run.evaluations, undisturbed.evaluations, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    rows = [
        [json.loads(line) for line in (each.folder / "predictions/test.jsonl").read_text("utf-8").splitlines()]
        for each in (run, undisturbed)
    ]
    assert [row["text"] for row in rows[0]] == [row["text"] for row in rows[1]]
    found, expected = [[[*row["probabilities"].values()] for row in run] for run in rows]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    print(f"probabilities: largest difference {np.max(np.abs(np.subtract(found, expected))):.1e}")


def test_a_machine_that_dies_is_done_without_and_taken_in_when_it_is_back(place: Path) -> None:
    write(place, steps=200)
    # Without it torchrun never tells the machine that comes back where the others meet (torch 2.13).
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    impatient = ",last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=8"
    with two_hosts(place, place) as (first, second):
        for host in (first, second):
            join(host, impatient, **own_store)
        wait_for(lambda: last_step(place) >= 15, "step 15 of both", first, second)
        second.cut_power()
        wait_for(lambda: "; 1 process on cpu" in first.said, "the first alone", first)
        alone = last_step(place)
        wait_for(lambda: last_step(place) >= alone + 5, "steps of the first alone", first)
        join(second, impatient, **own_store)
        ended = [first.ended("run"), second.ended("run")]
    run = ended[0]
    assert [outcome.code for outcome in ended] == [0, 0], ended[0].err + ended[1].err
    sizes = [line.partition("; ")[2].split()[0] for line in run.err.splitlines() if " on cpu, precision " in line]
    assert sizes == ["2", "1", "2"]
    assert run.err.count("continuing from") == 2
    assert "interrupted after step" in run.err  # for the machine that was taken in: no step was lost
    assert run.json("status.json")["state"] == "done"
    check_like_undisturbed(run, place)


def test_a_process_that_dies_on_one_machine_is_started_again_on_both(place: Path, tmp_path: Path) -> None:
    """They meet at the store of before, and what it needs of the checkpoint is sent to the machine that does not see it."""
    recipe = write(place, steps=40)
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "tiny.yaml").write_text(recipe.read_text(encoding="utf-8"), encoding="utf-8")
    with two_hosts(place, tmp_path / "second") as (first, second):
        for host in (first, second):
            join(host)
        wait_for(lambda: last_step(place) >= 15, "step 15 of both", first, second)
        (victim,) = second.trainers()
        os.kill(victim, signal.SIGKILL)
        ended = [first.ended("run"), second.ended("run")]
    run = ended[0]
    assert [outcome.code for outcome in ended] == [0, 0], ended[0].err + ended[1].err
    assert run.err.count("; 2 processes on cpu") == 2
    assert "process 0 of 2 lost another one" in run.err
    assert run.err.count("continuing from") == 1
    assert not (tmp_path / "second" / "run").exists()
    check_like_undisturbed(run, place)

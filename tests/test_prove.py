"""The proof: what it compares, what it says, and that it says no."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import ROOT, alone_on_the_cpu, start, write_recipe_in

from accel_trainer import prove as module
from accel_trainer.cli import main
from accel_trainer.prove import REORDERED, TOLERANCE, Layout, Leg, Trace, layouts, table

TRACE = Trace(
    loss=np.asarray([0.5, 0.25]),
    grad_norm=np.asarray([2.0, 1.0]),
    learning_rate=np.asarray([0.0, 0.1]),
    optimizer=np.asarray([3.0, 4.0]),
    logits=np.asarray([[0.1, -0.2], [0.3, -0.4]]),
)
SAME = dict.fromkeys(TOLERANCE, 0.0)


def test_every_way_is_compared() -> None:
    ways = layouts([1, 2, 4], 5, gpu=False)
    assert ways[0].legs == (Leg(1, 5),)
    assert len({way.name for way in ways}) == len(ways) == 13
    for count in (1, 2, 4):
        in_one_go = {(way.max_tokens, way.layout) for way in ways if way.legs == (Leg(count, 5),)}
        assert in_one_go == {(4096, "auto"), (1, "auto"), (4096, "padded")}
    for count in (2, 4):
        assert {way.legs for way in ways if len(way.legs) == 2 and Leg(count, 2) in way.legs} == {
            (Leg(count, 2), Leg(1, 5))
        }
        assert {way.legs for way in ways if way.legs[-1] == Leg(count, 5) and len(way.legs) == 2} == {
            (Leg(1, 2), Leg(count, 5))
        }
    assert all(way.legs[-1].until == 5 for way in ways)
    assert [way.legs for way in layouts([1], 2, gpu=False)][3:] == [(Leg(1, 1), Leg(1, 2))]
    assert all(len(way.legs) == 1 for way in layouts([2], 1, gpu=False))  # one step cannot be interrupted
    assert [way.legs[-1] for way in layouts([1], 3, gpu=True)][-2:] == [Leg(1, 3, "cuda")] * 2


def test_differences_are_the_largest_and_relative() -> None:
    other = Trace(
        TRACE.loss * [1.0, 1.5],
        TRACE.grad_norm * [0.75, 1.0],
        TRACE.learning_rate,
        TRACE.optimizer + np.asarray([0, 1]),
        TRACE.logits + np.asarray([[0, 0.1], [0, 0]]),
    )
    apart = {"loss": 0.5, "grad_norm": 0.25, "learning_rate": 0.0, "optimizer": 0.2, "logits": 0.25}
    assert other.difference(TRACE) == pytest.approx(apart)
    assert TRACE.difference(TRACE) == SAME
    broken = replace(TRACE, loss=np.asarray([0.5, np.nan]))
    assert broken.difference(TRACE) == {**SAME, "loss": float("inf")}
    assert replace(TRACE, learning_rate=np.asarray([0.0, 0.11])).difference(TRACE)["learning_rate"] == pytest.approx(
        0.1
    )
    empty = replace(TRACE, optimizer=np.empty(0))  # SGD remembers nothing
    assert empty.difference(empty) == SAME


def test_what_is_beyond_rounding_is_marked() -> None:
    rounding = {**dict.fromkeys(TOLERANCE, 1e-8), "learning_rate": 0.0}
    shown = table("a", 3, {Layout("two", (), 1): {**rounding, "logits": 0.5}}, rounding, agrees=False).splitlines()
    (line,) = (line for line in shown if line.startswith("two"))
    assert line.split()[1:] == ["1.0e-08", "1.0e-08", "0.0e+00", "1.0e-08", "5.0e-01!"]
    assert [line for line in shown if "!" in line][1:] == [shown[-1]]
    assert any(line.startswith(REORDERED) for line in shown)


def run_main(place: Path, *arguments: str) -> int:
    with alone_on_the_cpu(place / "cache"):
        return main(["prove", *arguments])


@pytest.mark.parametrize("key", TOLERANCE)
def test_a_difference_fails(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    recipe, steps = write_recipe_in(tmp_path), 2
    taken: list[Layout] = []

    def pretend(run: Any, recipe: Path, overrides: Any, layout: Layout, folder: Path, **more: Any) -> Trace:
        taken.append(layout)
        factor = 1 + (2 * TOLERANCE[key] + 1e-12 if len(taken) == 4 else 0)
        return replace(TRACE, **{key: getattr(TRACE, key) * factor})

    monkeypatch.setattr(module, "take_steps", pretend)
    monkeypatch.setattr(module, "reversed_order", lambda run, steps: TRACE)
    assert run_main(tmp_path, str(recipe), "--steps", str(steps), "--output", str(tmp_path / "proof.json")) == 1
    proof = json.loads((tmp_path / "proof.json").read_text(encoding="utf-8"))
    assert proof["agrees"] is False
    assert len(proof["layouts"]) == len(taken) - 1
    assert [layout["name"] for layout in proof["layouts"] if layout[key] > TOLERANCE[key]] == [taken[3].name]
    assert "NOT the same" in capsys.readouterr().out


def test_the_second_leg_is_not_excused_by_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What status.json says of an earlier leg is no reason why a later one failed."""
    recipe = write_recipe_in(tmp_path)
    ways = [Layout("broken", (Leg(1, 1), Leg(0, 2)), 4096)]  # no launcher starts no process
    monkeypatch.setattr(module, "layouts", lambda *arguments, **more: ways)
    assert run_main(tmp_path, str(recipe), "--steps", "2") == 1
    said = capsys.readouterr().err
    assert "broken: the trainer failed" in said
    assert "interrupted" not in said


BROKEN = """
import os
from accel_trainer import collectives, dropout, train
keys = dropout.example_keys
dropout.example_keys = lambda rows, *, seed, step: keys(rows, seed=seed + int(os.environ.get("RANK", 0)), step=step)
collectives.end_process(train.main())
"""


@pytest.mark.launch
def test_a_trainer_that_keeps_no_promise_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Real launches of a trainer whose dropout depends on the rank."""
    recipe = write_recipe_in(tmp_path)
    (tmp_path / "broken_trainer.py").write_text(BROKEN, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(module, "TRAINER", "broken_trainer")
    ways = [Layout("1 process", (Leg(1, 1),), 4096), Layout("2 processes", (Leg(2, 1),), 4096)]
    monkeypatch.setattr(module, "layouts", lambda *arguments, **more: ways)
    monkeypatch.setenv("WORLD_SIZE", "2")  # a launch around this command changes nothing
    monkeypatch.setenv("RANK", "1")
    assert module.prove(str(recipe), steps=1) is False
    assert "NOT the same" in capsys.readouterr().out


def test_a_run_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    recipe = write_recipe_in(tmp_path)
    monkeypatch.setattr(module, "shipped", lambda name: tmp_path)  # no accelerate config there
    assert run_main(tmp_path, str(recipe)) == 1
    said = capsys.readouterr().err
    assert "1 process: the trainer failed" in said
    assert "cpu.yaml" in said
    assert "Traceback" not in said.splitlines()[0]


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--processes", "0,1"], ["missing=1"]])
def test_mistakes(arguments: list[str], tmp_path: Path) -> None:
    assert run_main(tmp_path, str(write_recipe_in(tmp_path)), *arguments) == 2


@pytest.mark.launch
def test_a_recipe_is_proved(tmp_path: Path) -> None:
    """Through real launches; the schedule is the recipe's own, and nothing of the recipe's saving gets in the way."""
    recipe = write_recipe_in(tmp_path, evaluation={"early_stopping_patience": 1})
    command = [sys.executable, "-c", "import sys; from accel_trainer.cli import main; sys.exit(main())"]
    proof = start([*command, "prove", str(recipe), "--steps", "2", "--output", "proof.json"], tmp_path, timeout=600)
    assert proof.code == 0, proof.err
    assert proof.out.splitlines()[-1] == "the same training"
    found = proof.json("proof.json")
    assert len(found["layouts"]) == 7
    assert [layout["layout"] for layout in found["layouts"]].count("padded") == 2
    assert found["reference"]["loss"][0] != found["reference"]["loss"][1]
    for layout in found["layouts"]:
        assert 0 <= layout["loss"] <= 2e-6
    assert any(layout["loss"] > 0 or layout["logits"] > 0 for layout in found["layouts"])  # they were computed anew
    assert 0 < max(found["summed_in_reverse"].values()) < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir() if "run" in path.name) == []

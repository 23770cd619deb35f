"""The one promise: processes, micro-batches, padding and interruptions change a run by rounding, and by nothing else.

Dropout is on, everywhere a BERT has it, labels are smoothed, gradients clipped, and the last batch of each epoch is
ragged. Ranks are threads (`simulated.py`); `tests/distributed` does the same with real processes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import alone_on_the_cpu, write_recipe_in
from simulated import train_as

from accel_trainer.inputs import Inputs, read_inputs
from accel_trainer.recipe_file import load_recipe

STEPS = 50
LONGEST = 16
MICRO_BATCHES = {"1": 1, "4": 4 * LONGEST, "all": 10_000}  # examples → tokens
PROCESSES = (1, 2, 4)
# Examples packed or padded in turn, and after the interruption the other way.
LAYOUTS = [
    (processes, micro_batch, ("packed", "padded")[i % 2])
    for i, (processes, micro_batch) in enumerate(itertools.product(PROCESSES, MICRO_BATCHES))
]
OTHER = {"packed": "padded", "padded": "packed"}
# Largest relative difference of any step's loss.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("same")
    with alone_on_the_cpu(place / "datasets-cache"):
        yield place


def read(place: Path, name: str, *, save_steps: int | None = None, **training: Any) -> Inputs:
    recipe = write_recipe_in(
        place,
        f"{name}.yaml",
        dataset={"splits": {"train": 59, "validation": 20}},  # 8 steps an epoch, the last of 3 examples
        model={"hidden_dropout": 0.1, "attention_dropout": 0.1, "classifier_dropout": 0.1},
        training={
            "max_steps": STEPS,
            "num_train_epochs": None,
            "label_smoothing_factor": 0.1,
            "warmup_steps": 5,
            "max_grad_norm": 0.5,
            **training,
        },
        evaluation={"eval_strategy": "no"},
        saving={
            "load_best_model_at_end": False,
            "save_total_limit": None,
            **({"save_strategy": "steps", "save_steps": save_steps} if save_steps else {"save_strategy": "no"}),
        },
    )
    return read_inputs(load_recipe(recipe))


@pytest.fixture(scope="module", params=list(TOLERANCE), ids=str)
def inputs(request: pytest.FixtureRequest, place: Path) -> Inputs:
    read_in = read(place, "same")
    return dataclasses.replace(read_in, model=read_in.model.to(request.param))


def steps_of(folder: Path) -> dict[str, np.ndarray]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return {key: np.asarray([line[key] for line in lines]) for key in ("loss", "grad_norm", "learning_rate", "tokens")}


@pytest.fixture(scope="module")
def reference(inputs: Inputs, place: Path) -> dict[str, np.ndarray]:
    folder = place / f"reference-{inputs.model.dtype}"
    train_as(inputs, folder, 1, MICRO_BATCHES["all"], layout="padded")
    return steps_of(folder)


def check(found: dict[str, np.ndarray], reference: dict[str, np.ndarray], tolerance: float) -> None:
    assert np.abs(found["loss"] / reference["loss"] - 1).max() <= tolerance
    assert np.abs(found["grad_norm"] / reference["grad_norm"] - 1).max() <= 10 * tolerance
    np.testing.assert_array_equal(found["learning_rate"], reference["learning_rate"])
    np.testing.assert_array_equal(found["tokens"], reference["tokens"])


@pytest.mark.parametrize(("processes", "micro_batch", "layout"), LAYOUTS)
def test_any_layout_resumed_on_any_other(
    inputs: Inputs, reference: dict[str, np.ndarray], tmp_path: Path, processes: int, micro_batch: str, layout: str
) -> None:
    draw = np.random.default_rng([processes, list(MICRO_BATCHES).index(micro_batch)])
    stop = int(draw.integers(1, STEPS))
    later = int(draw.choice([count for count in PROCESSES if count != processes]))
    train_as(inputs, tmp_path, processes, MICRO_BATCHES[micro_batch], layout=layout, stop_after=stop)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"checkpoint-{stop}"]
    train_as(inputs, tmp_path, later, MICRO_BATCHES[draw.choice(list(MICRO_BATCHES))], layout=OTHER[layout])
    check(steps_of(tmp_path), reference, TOLERANCE[inputs.model.dtype])


@pytest.mark.parametrize(("processes", "layout"), [(1, "packed"), (2, "padded"), (2, "packed")])
def test_resumed_from_every_step_the_bits_are_the_same(
    place: Path, tmp_path: Path, processes: int, layout: str
) -> None:
    inputs = read(place, "bits", save_steps=1, max_steps=10)
    train_as(inputs, tmp_path / "whole", processes, MICRO_BATCHES["4"], layout=layout)
    last = Path("checkpoints") / "checkpoint-10"
    for step in range(1, 10):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(
            tmp_path / "whole" / "checkpoints" / f"checkpoint-{step}", folder / "checkpoints" / f"checkpoint-{step}"
        )
        shutil.copy(tmp_path / "whole" / "metrics.jsonl", folder)
        train_as(inputs, folder, processes, MICRO_BATCHES["4"], layout=layout)
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert (folder / last / file).read_bytes() == (tmp_path / "whole" / last / file).read_bytes()
        assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()

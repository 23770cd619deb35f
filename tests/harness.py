"""Runs of the trainer for tests: in this process with Accelerate forgotten in between, or started as a user would."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from support import reviews, tiny_recipe, write_csv

from accel_trainer.launching import LAUNCH_VARIABLES, no_launch_around

ROOT = Path(__file__).resolve().parent.parent
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}


def forget_accelerate() -> None:
    """Let the next Accelerator be made afresh."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


@contextlib.contextmanager
def alone_on_the_cpu(cache: Path) -> Iterator[None]:
    """No launch around, the CPU, and a cache of its own; module-wide fixtures run before `own_caches`."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(LAUNCH_VARIABLES):
                patch.delenv(name)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        forget_accelerate()
        try:
            yield
        finally:
            forget_accelerate()


@dataclass
class Outcome:
    """How a run ended, and what it left."""

    code: int
    folder: Path
    out: str
    err: str

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "split" not in line]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "split" in line]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.steps]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model" / "model.safetensors")

    @property
    def weights_sha256(self) -> str:
        return hashlib.sha256((self.folder / "model" / "model.safetensors").read_bytes()).hexdigest()

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())


def run_trainer(recipe: Path, folder: Path, *arguments: str) -> Outcome:
    """`accel_trainer.train` in this process, on the CPU."""
    from accel_trainer.train import main

    out, err = io.StringIO(), io.StringIO()
    cache = folder.parent / "datasets-cache"
    with alone_on_the_cpu(cache), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(recipe), "--output_dir", str(folder), *arguments])
    return Outcome(code, folder, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def signal_at(step: int, *numbers: signal.Signals) -> Iterator[None]:
    """Send this process signals when that step's update is done and before anything follows from it."""
    from accel_trainer.run import TrainerState

    add = TrainerState.add

    def added(state: TrainerState, done: Any) -> None:
        add(state, done)
        if state.step == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainerState, "add", added)
        yield


def write_recipe_in(folder: Path, name: str = "tiny.yaml", rows: int = 90, **sections: Any) -> Path:
    """A table of reviews and a tiny recipe for it, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "reviews.csv"
    if not table.exists():
        write_csv(table, reviews(rows))
    path = folder / name
    path.write_text(yaml.safe_dump(tiny_recipe(table, **sections), allow_unicode=True), encoding="utf-8")
    return path


def user_environment(folder: Path, **more: str) -> dict[str, str]:
    """Environment of a launch: this one without a launch's variables, offline, one thread, a cache of its own."""
    return {
        **no_launch_around(),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_CACHE": str(folder / "datasets-cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **more,
    }


def start(command: list[str], folder: Path, timeout: float = 120, **environment: str) -> Outcome:
    """A command as a user types it, in `folder`."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=user_environment(folder, **environment),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Outcome(done.returncode, folder, done.stdout, done.stderr)


def python(code: str, folder: Path, *arguments: str, **environment: str) -> Outcome:
    """Some code in a fresh interpreter."""
    return start([sys.executable, "-c", code, *arguments], folder, **environment)


class OneOfMany:
    """An Accelerator's stand-in: process `index` of `count`, whose collectives are recorded or played back."""

    device = torch.device("cpu")
    scaler = None

    def __init__(self, index: int, count: int, gathered: torch.Tensor | None = None) -> None:
        self.process_index, self.num_processes, self.gathered = index, count, gathered
        self.sent: list[torch.Tensor] = []
        self.synchronised: list[bool] = []  # by backward pass
        self._synchronises = True

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sent.append(tensor.clone())
        return tensor.repeat(self.num_processes, 1) if self.gathered is None else self.gathered

    @contextlib.contextmanager
    def no_sync(self, model: Any) -> Iterator[None]:
        self._synchronises = False
        yield
        self._synchronises = True

    def backward(self, loss: torch.Tensor) -> None:
        self.synchronised.append(self._synchronises)
        loss.backward()

    def clip_grad_norm_(self, parameters: Any, bound: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, bound)


# Family → arguments of its config: two layers of width 16, positions for 16 tokens and RoBERTa's offset.
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {**SIZES, "max_position_embeddings": 32},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 32},
    "roberta": {**SIZES, "max_position_embeddings": 34},
    "xlm-roberta": {**SIZES, "max_position_embeddings": 34},
    "electra": {**SIZES, "embedding_size": 8, "max_position_embeddings": 32},
    "albert": {**SIZES, "embedding_size": 8, "max_position_embeddings": 32},
    "modernbert": {**SIZES, "max_position_embeddings": 32, "local_attention": 8},
}

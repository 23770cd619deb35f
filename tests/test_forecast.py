"""What is told before a run is what the run then does."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands import config as config_commands
from harness import alone_on_the_cpu, forget_accelerate, run_trainer
from hypothesis import given
from hypothesis import strategies as st

from accel_trainer import forecast as forecasting
from accel_trainer import speed
from accel_trainer.accelerate_config import AccelerateConfig
from accel_trainer.cli import main
from accel_trainer.errors import RunFolderError
from accel_trainer.forecast import Forecast, Seconds, forecast, moments
from accel_trainer.forecast_table import print_forecast
from accel_trainer.recipe_file import load_recipe
from accel_trainer.speed import Speed


@pytest.fixture(autouse=True)
def no_launch(tmp_path: Path) -> Iterator[None]:
    with alone_on_the_cpu(tmp_path / "datasets-cache"):
        yield


def config(num_processes: int = 1, *, use_cpu: bool = True, mixed_precision: str = "no") -> AccelerateConfig:
    return AccelerateConfig(
        path=Path("launch.yaml"),
        distributed_type="MULTI_GPU" if num_processes > 1 else "NO",
        num_processes=num_processes,
        num_machines=1,
        mixed_precision=mixed_precision,
        use_cpu=use_cpu,
        dynamo_backend="no",
        lines={},
    )


def told(path: Path, *overrides: str, **options: Any) -> Forecast:
    forget_accelerate()
    options = {"output_dir": path.parent / "runs", "measures": False} | options
    return forecast(load_recipe(path, overrides), **options)


@pytest.mark.parametrize("arguments", [(), ("--layout", "padded"), ("--max_tokens_per_device", "40")])
def test_a_run_does_what_was_told(
    write_recipe: Callable[..., Path], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    recipe = write_recipe()
    options = {name.removeprefix("--"): value for name, value in zip(arguments[::2], arguments[1::2], strict=True)}
    if "max_tokens_per_device" in options:
        options["max_tokens_per_device"] = int(options["max_tokens_per_device"])  # type: ignore[assignment]
    expected = told(recipe, **options)
    outcome = run_trainer(recipe, tmp_path / "run", *arguments)
    assert outcome.code == 0, outcome.err
    run, results = outcome.json("run.json"), outcome.json("results.json")["train"]
    assert expected.plan.as_dict() == run["plan"]
    assert expected.parameters == run["parameters"]
    assert expected.max_tokens == run["max_tokens_per_device"]
    assert ("packed" if expected.packed else "padded") == run["layout"]
    assert {role: size.rows for role, size in expected.roles.items()} == {
        role: facts["rows"] for role, facts in run["dataset"].items()
    }
    assert sum(size.tokens for size in expected.steps.sizes) == results["tokens"]
    assert expected.steps.padding_avoided == pytest.approx(results["padding_avoided"], abs=1e-12)
    assert (expected.steps.padding_avoided > 0) is expected.packed  # padded, each batch is padded to about its longest


def test_the_disk_that_was_told_is_what_lies_there(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = write_recipe(saving={"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2})
    expected = told(recipe).disk
    outcome = run_trainer(recipe, tmp_path / "run")
    tensors = sorted((outcome.folder / "checkpoints").glob("*/*.safetensors"))
    kept = sum(path.stat().st_size for path in tensors)
    assert len(tensors) == 4  # two checkpoints
    assert expected.checkpoints * 2 / 3 == pytest.approx(kept, rel=0.25)  # files have headers, and counts of steps
    assert expected.model == pytest.approx((outcome.folder / "model" / "model.safetensors").stat().st_size, rel=0.25)
    predictions = sum(path.stat().st_size for path in (outcome.folder / "predictions").iterdir())
    assert expected.predictions == pytest.approx(predictions, rel=0.5)
    unlimited = told(recipe, "saving.save_total_limit=null").disk
    assert unlimited.checkpoints == 4 / 3 * expected.checkpoints  # steps 2, 4, 6, 8


def test_processes_share_the_steps(write_recipe: Callable[..., Path]) -> None:
    recipe = write_recipe()
    one = told(recipe, config=config(), max_tokens_per_device=30)
    three = told(recipe, config=config(3), max_tokens_per_device=30)
    assert three.plan == one.plan
    assert [size.tokens for size in three.steps.sizes] == [size.tokens for size in one.steps.sizes]
    assert max(three.steps.micro_batches) < max(one.steps.micro_batches)
    assert three.needs.gradients == 2 * one.needs.gradients
    assert one.target.memory is not None
    assert three.target.memory == one.target.memory // 3


def test_a_device_that_is_not_here(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(forecasting.torch.accelerator, "is_available", lambda *_, **__: False)
    found = told(write_recipe(), config=config(2, use_cpu=False, mixed_precision="bf16"), measures=True)
    assert not found.target.is_here
    assert found.target.memory is None
    assert found.seconds is None
    assert "no such device" in found.unmeasured
    assert found.steps.activations < told(write_recipe()).steps.activations  # bf16
    print_forecast(found)
    said = capsys.readouterr().out
    assert said.split()[:8] == ["launch", "processes", "2", "cuda,", "bf16;", "as", "launch.yaml", "says"]
    assert "tokens at most, assumed: the memory of the device is not known here" in said
    given = told(write_recipe(), config=config(2, use_cpu=False), max_tokens_per_device=100)
    assert not given.budget_is_assumed


def test_the_environment_is_left_as_it_was(write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "7")  # of a launch around it
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    before = dict(os.environ)
    told(write_recipe(), config=config())
    assert dict(os.environ) == before


def test_measured_seconds_are_those_of_all_steps(
    write_recipe: Callable[..., Path], capsys: Any, tmp_path: Path
) -> None:
    recipe = write_recipe()
    found = told(recipe, measures=True)
    assert found.seconds is not None
    assert min(found.seconds.training, found.seconds.evaluation, found.seconds.saving) > 0
    assert not list((tmp_path / "runs").glob("*"))  # nothing is left
    assert not list(tmp_path.glob(".accel-trainer-plan-*"))
    print_forecast(found)
    said = capsys.readouterr().out
    assert "measured here on 1 process, cpu" in said


@pytest.mark.parametrize("measures", [True, False])
def test_a_folder_that_cannot_be_written_to(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, measures: bool
) -> None:
    recipe, closed, mkdir = write_recipe(), tmp_path / "closed", os.mkdir
    closed.mkdir()

    def refused(path: Any, *arguments: Any, **options: Any) -> None:  # as root may write anywhere
        if closed in Path(path).parents:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", refused)
    found = told(recipe, output_dir=closed / "runs", measures=measures)
    (warning,) = found.warnings()
    assert warning == f"nothing can be written to {closed} (Permission denied); choose another --output_dir"
    print_forecast(found)
    said = capsys.readouterr().out
    assert ("not measured: nothing could be written" in said) is measures
    assert ("without saving" in said) is measures


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="Linux")
def test_a_place_where_there_are_no_folders(write_recipe: Callable[..., Path]) -> None:
    (warning,) = told(write_recipe(), output_dir=Path("/proc/no/folder"), measures=True).warnings()
    assert "nothing can be written to /proc" in warning


def test_a_full_disk_is_no_failure(write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RunFolderError("no space left on the device")

    monkeypatch.setattr(speed.checkpoint, "save_checkpoint", full)
    found = told(write_recipe(), measures=True)
    assert found.seconds is not None
    assert found.seconds.saving is None
    assert not found.disk.problem


@pytest.mark.parametrize("num_processes", [None, 2])
def test_the_users_own_config_is_taken(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    num_processes: int | None,
) -> None:
    default = tmp_path / "default_config.yaml"
    monkeypatch.setattr(config_commands, "default_config_file", str(default))
    if num_processes is not None:
        written = f"distributed_type: MULTI_GPU\nnum_processes: {num_processes}\nuse_cpu: true\ngpu_ids: '-1,-1'\n"
        default.write_text(written, encoding="utf-8")
    assert main(["plan", str(write_recipe()), "--no_measure", "--output_dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    count, config = (1, "no accelerate config") if num_processes is None else (2, f"as {default} says")
    assert said.split(maxsplit=4) == ["launch", "processes", str(count), "cpu,", f"float32; {config}"]


def test_seconds_grow_with_what_is_done(write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Speed(position=0.5, update=2.0, token=0.25, saving=1000.0)
    monkeypatch.setattr(forecasting, "measure", lambda *_: measured)
    once, twice, rarely, often, unsaved = (
        told(write_recipe(), *overrides, measures=True)
        for overrides in (
            (),
            ("training.num_train_epochs=2",),
            ("evaluation.eval_strategy=no",),
            ("evaluation.eval_strategy=steps", "evaluation.eval_steps=1"),
            ("saving.save_strategy=no",),
        )
    )
    tokens = sum(size.tokens for size in once.steps.sizes)
    assert once.seconds is not None
    assert once.seconds.training == pytest.approx(0.5 * tokens + 2.0 * once.plan.total_steps)
    rows = once.roles
    assert once.seconds.evaluation == 0.25 * (2 * rows["validation"].tokens + rows["test"].tokens)
    weights, optimizer = once.disk.model, once.needs.optimizer
    assert once.seconds.saving == (weights + optimizer + 2 * weights) / 1000.0
    assert twice.seconds is not None
    assert twice.seconds.training == pytest.approx(2 * once.seconds.training)
    assert rarely.seconds is not None
    assert rarely.seconds.evaluation == 0.25 * (rows["validation"].tokens + rows["test"].tokens)
    assert often.seconds is not None
    assert often.seconds.evaluation == 0.25 * (9 * rows["validation"].tokens + rows["test"].tokens)
    assert unsaved.seconds is not None
    assert unsaved.seconds.saving == 2 * weights / 1000.0


def test_shares_take_less_memory_and_as_much_disk(write_recipe: Callable[..., Path], capsys: Any) -> None:
    whole, shared = (
        told(write_recipe(), config=replace(config(2), distributed_type=kind)) for kind in ("MULTI_GPU", "FSDP")
    )
    assert (whole.target.sharded, shared.target.sharded) == (False, True)
    assert shared.needs.optimizer == whole.needs.optimizer // 2
    assert shared.needs.gradients == whole.needs.gradients // 4  # without buckets
    assert shared.disk.total == whole.disk.total
    print_forecast(shared)
    said = capsys.readouterr().out
    assert "its share, and what is put together at once" in said
    assert "buckets" not in said


def test_warnings(write_recipe: Callable[..., Path], capsys: Any) -> None:
    quiet = told(write_recipe())
    assert quiet.warnings() == []
    loud = told(write_recipe(), "tracking.logging_steps=100", "training.warmup_steps=8")
    loud = replace(
        loud,
        target=replace(loud.target, memory=loud.memory - 1),
        disk=replace(loud.disk, free=loud.disk.total - 1),
        seconds=Seconds(1.0, 1.5, 0.0),
    )
    found = loud.warnings()
    keys = ["--gradient_checkpointing", "saving.save_total_limit", "evaluation.eval_steps", "warmup", "logging_steps"]
    assert len(found) == len(keys)
    assert all(key in warning for key, warning in zip(keys, found, strict=True))
    print_forecast(loud)
    assert capsys.readouterr().out.count("warning: ") == len(keys)
    fits = replace(
        loud,
        target=replace(loud.target, memory=loud.memory),
        disk=replace(loud.disk, free=loud.disk.total),
        seconds=Seconds(1.5, 1.5, 0.0),
    )
    assert len(fits.warnings()) == 2


def test_memory_is_the_sum_and_the_evaluation_where_it_is_more(write_recipe: Callable[..., Path], capsys: Any) -> None:
    found = told(write_recipe())
    assert found.memory >= found.program + found.needs.state + found.steps.activations
    assert 2**27 < found.program < 2**31  # torch and the rest of this process
    larger = replace(found, evaluation=found.needs.gradients + found.steps.activations + 5 * 2**30)
    assert larger.memory == found.program + found.needs.state + found.steps.activations + 5 * 2**30
    print_forecast(larger)
    rows = capsys.readouterr().out.splitlines()
    memory = [line.split()[:2] for line in rows[next(i for i, line in enumerate(rows) if line.startswith("memory")) :]]
    assert [words[-1] if words[0] == "memory" else words[0] for words in memory[:8]] == [
        "weights", "gradients", "optimizer", "activations", "beside", "evaluation", "program", "sum",
    ]  # fmt: skip
    assert "5.00 GiB  beyond that" in "\n".join(rows)


@given(st.integers(1, 500), st.integers(1, 100))
def test_moments_are_those_of_the_plan(steps: int, every: int) -> None:
    assert moments(steps, every) == sum(step == steps or step % every == 0 for step in range(1, steps + 1))

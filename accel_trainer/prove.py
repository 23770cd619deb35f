"""Prove on a recipe that nothing but rounding depends on the hardware: `accel-trainer prove RECIPE`.

The recipe's first steps are taken by the trainer itself, started through `accelerate launch` as a user would: as several
numbers of processes, several examples at a time or one, in one go and interrupted and resumed elsewhere. What they computed
is compared with one process in one go. Beside it stands how far the result moves when that process only adds up the same
numbers in another order, which is what rounding alone does.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.linalg import norm
from safetensors.torch import load_file

from accel_trainer import batching, hardware
from accel_trainer.errors import TrainingFailed, UserError
from accel_trainer.evaluation import predict_logits
from accel_trainer.inputs import read_inputs
from accel_trainer.launching import LAUNCH_VARIABLES, LAUNCHER, TRAINER, launched, no_launch_around
from accel_trainer.library import find_recipe, shipped
from accel_trainer.plan import TrainingPlan
from accel_trainer.recipe_file import load_recipe
from accel_trainer.run import Run, optimizer_state, prepare, shapes_of
from accel_trainer.run_folder import RunFolder, write_json
from accel_trainer.signals import interrupted_by_signals
from accel_trainer.tracking import logger, quieten_libraries
from accel_trainer.train import add_gradients, apply_gradients

Numbers = npt.NDArray[np.float64]

FIXED_ROWS = 32  # whose logits are compared after the last step
# Relative differences that pass as rounding in any recipe: of the loss, the gradient norm and the learning rate of any step;
# of the optimizer's state after the last step, which remembers every gradient even while the rate is next to nothing; of the
# logits, relative to the largest of them. Where adding in another order moves a recipe further, so may a layout: see `allowed`.
TOLERANCE = {"loss": 2e-6, "grad_norm": 5e-6, "learning_rate": 0.0, "optimizer": 5e-6, "logits": 1e-5}
MARGIN = 30  # assumption: one other order shows the size of rounding, not the most that it can do
# What a proof needs changed in the recipe; none of it reaches a step.
QUIET = (
    "evaluation.eval_strategy=no",
    "evaluation.early_stopping_patience=null",
    "saving.save_strategy=no",
    "saving.load_best_model_at_end=false",
    "tracking.logging_steps=1",
    "tracking.report_to=[]",
)


REORDERED = "1 process, summed in reverse"


@dataclass(frozen=True)
class Leg:
    """A part of a run that one launch computes, up to a step."""

    processes: int
    until: int
    device: str = "cpu"


@dataclass(frozen=True)
class Layout:
    """One way to compute the same steps."""

    name: str
    legs: tuple[Leg, ...]
    max_tokens: int
    layout: str = "auto"  # packed where that is possible


@dataclass(frozen=True)
class Trace:
    """What some steps computed. Legend: s steps, m numbers of the optimizer's state, n fixed rows, c classes."""

    loss: Numbers  # (s,)
    grad_norm: Numbers  # (s,)
    learning_rate: Numbers  # (s,)
    optimizer: Numbers  # (m,), after the last step
    logits: Numbers  # (n, c), after the last step

    def difference(self, other: Trace) -> dict[str, float]:
        """Relative differences from `other`, as `TOLERANCE` has them; what is not a number counts as infinitely far."""
        apart = {
            "loss": np.abs(self.loss / other.loss - 1).max(),
            "grad_norm": np.abs(self.grad_norm / other.grad_norm - 1).max(),
            # A warm-up begins with 0.
            "learning_rate": np.abs(self.learning_rate - other.learning_rate).max()
            / (other.learning_rate.max() or 1.0),
            "optimizer": norm(self.optimizer - other.optimizer) / norm(other.optimizer)
            if len(other.optimizer)
            else 0.0,
            "logits": np.abs(self.logits - other.logits).max() / np.abs(other.logits).max(),
        }
        return {name: float(value) if np.isfinite(value) else float("inf") for name, value in apart.items()}


def allowed(spread: dict[str, float]) -> dict[str, float]:
    """The largest differences that count as rounding, where one other order of adding gives `spread`."""
    return {key: max(tolerance, MARGIN * spread[key]) for key, tolerance in TOLERANCE.items()}


def layouts(processes: Sequence[int], steps: int, *, gpu: bool) -> list[Layout]:
    """The reference, one process in one go on the CPU, and then every other way."""
    budget = batching.CPU_TOKENS
    found = [Layout("1 process", (Leg(1, steps),), budget)]
    found.append(Layout("1 process, one example at a time", (Leg(1, steps),), 1))
    found.append(Layout("1 process, padded", (Leg(1, steps),), budget, "padded"))
    for count in sorted({*processes} - {1}):
        found.append(Layout(f"{count} processes", (Leg(count, steps),), budget))
        found.append(Layout(f"{count} processes, one example at a time", (Leg(count, steps),), 1))
        found.append(Layout(f"{count} processes, padded", (Leg(count, steps),), budget, "padded"))
    half = steps // 2
    if half:
        for count in sorted({*processes} - {1}):
            found.append(Layout(f"1 process, resumed as {count}", (Leg(1, half), Leg(count, steps)), budget))
            found.append(Layout(f"{count} processes, resumed as 1", (Leg(count, half), Leg(1, steps)), budget))
        if {*processes} == {1}:
            found.append(Layout("1 process, resumed", (Leg(1, half), Leg(1, steps)), budget))
    if gpu:
        found.append(Layout("1 GPU", (Leg(1, steps, "cuda"),), budget))
        if half:
            found.append(Layout("1 process, resumed on a GPU", (Leg(1, half), Leg(1, steps, "cuda")), budget))
    return found


def prove(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    processes: Sequence[int] = (1, 2),
    steps: int = 3,
    output: Path | None = None,
    trust_remote_code: bool = False,
) -> bool:
    """Take a recipe's first steps in every layout, print how far they differ, and write it to `output` as JSON.

    Args:
        recipe: path or name.
        overrides: `section.key=value`.
        processes: numbers of processes on this machine; 1 is always among them.
        steps: optimizer steps; fewer if the recipe has fewer.
        output: a JSON file, None for none.
        trust_remote_code: run code that the checkpoint's repository holds.

    Returns:
        whether every layout agrees with the reference to within what is `allowed`.

    Raises:
        UserError: recipe or data are not as they should be, or a number makes no sense.
        TrainingFailed: a run of the trainer failed.
        Interrupted: a signal came; nothing is left.
    """
    if steps < 1 or min(processes, default=0) < 1:
        given = f"--steps {steps} --processes {','.join(map(str, processes))}"
        raise UserError(f"prove: {given}: give positive numbers, such as --steps 3 --processes 1,2")
    if output is not None and output.is_dir():
        raise UserError(f"--output {output}: it is a folder; name a file")
    # This process is no part of a launch, and computes in float32 on the CPU, whatever its environment says.
    for name in [name for name in os.environ if name.startswith(LAUNCH_VARIABLES)]:
        del os.environ[name]
    os.environ["ACCELERATE_USE_CPU"] = "true"
    quieten_libraries()
    name, path = find_recipe(recipe)
    overrides = [*overrides, *QUIET]
    inputs = read_inputs(load_recipe(path, overrides), trust_remote_code=trust_remote_code)
    steps = min(steps, TrainingPlan.of(inputs.recipe, len(inputs.splits["train"])).total_steps)
    with interrupted_by_signals(resumable=False), tempfile.TemporaryDirectory(prefix="accel-trainer-prove-") as place:
        run = prepare(hardware.start_accelerator(), inputs, RunFolder(Path(place) / "reordered"))
        reordered = reversed_order(run, steps)
        traces = {}
        ways = layouts(processes, steps, gpu=torch.cuda.is_available())
        logger.info("%d launches of the trainer, %d steps in each layout", sum(len(way.legs) for way in ways), steps)
        if steps == 1:
            logger.info("one step cannot be interrupted: resuming is proved with --steps 2 or more")
        for i, layout in enumerate(ways):
            started = time.perf_counter()
            folder = Path(place) / str(i)
            traces[layout] = take_steps(run, path, overrides, layout, folder, trust_remote_code=trust_remote_code)
            logger.info("%d/%d %s: %.0f s", i + 1, len(ways), layout.name, time.perf_counter() - started)
    reference = next(iter(traces.values()))
    spread = reordered.difference(reference)
    differences = {layout: trace.difference(reference) for layout, trace in list(traces.items())[1:]}
    agrees = all(found[key] <= allowed(spread)[key] for found in differences.values() for key in TOLERANCE)
    print(table(name, steps, differences, spread, agrees=agrees))
    if output is not None:
        write_json(output, report(name, steps, reference, differences, spread, agrees=agrees))
    return agrees


def reversed_order(run: Run, steps: int) -> Trace:
    """The steps of one process that adds up each global batch from its other end."""
    run.model.train()
    loss, grad_norm, learning_rate = [], [], []
    for step in range(steps):
        rows, (micro_batches,) = run.feed.divide(step, run.max_tokens)
        backwards = [replace(part, indices=part.indices[::-1].copy()) for part in reversed(micro_batches)]
        loss.append(float(add_gradients(run, run.feed.load(step, rows, backwards), len(rows))) / len(rows))
        learning_rate.append(run.scheduler.get_last_lr()[-1])
        grad_norm.append(float(apply_gradients(run)))
    state, _ = optimizer_state(run)
    return Trace(np.asarray(loss), np.asarray(grad_norm), np.asarray(learning_rate), flat(state), fixed_logits(run))


def flat(state: dict[str, torch.Tensor]) -> Numbers:
    """All that an optimizer remembers of gradients, in the order of the names; shape (m,)."""
    names = sorted(name for name in state if not name.endswith(" step"))  # a count, beside which all else would vanish
    return np.concatenate([np.empty(0), *(state[name].double().ravel().numpy() for name in names)])


def fixed_logits(run: Run) -> Numbers:
    """Logits of the first rows of the validation split, or of the training split; shape (n, c)."""
    tokens = run.inputs.splits.get("validation", run.inputs.splits["train"]).tokens
    first = replace(tokens, lengths=tokens.lengths[:FIXED_ROWS])
    shapes = shapes_of(run, first)
    logits = predict_logits(run.accelerator, run.model, first, run.max_tokens, packed=run.packed, shapes=shapes)
    return logits.astype(np.float64)


def take_steps(
    run: Run, recipe: Path, overrides: Sequence[str], layout: Layout, folder: Path, *, trust_remote_code: bool
) -> Trace:
    """Start the trainer once for each leg of a layout and read what it left; `run` computes the final logits.

    Raises:
        TrainingFailed: the trainer failed.
    """
    for leg in layout.legs:
        config = "single_gpu" if leg.device == "cuda" else "cpu" if leg.processes == 1 else "multi_cpu"
        launch = [*LAUNCHER, "--mixed_precision", "no"]
        launch += ["--config_file", str(shipped("accelerate_configs") / f"{config}.yaml")]
        launch += ["--num_processes", str(leg.processes), "-m", TRAINER, str(recipe), *overrides]
        launch += ["--output_dir", str(folder), "--max_tokens_per_device", str(layout.max_tokens)]
        launch += ["--layout", layout.layout]
        launch += ["--stop_after", str(leg.until), "--resume", *["--trust_remote_code"] * trust_remote_code]
        _, said = launched(
            launch, {**no_launch_around(), "TMPDIR": str(folder.parent)}
        )  # where torchrun leaves folders
        status = RunFolder(folder).status()
        if (status.get("state"), status.get("step")) != ("interrupted", leg.until):
            told = status.get("reason") if status.get("state") == "failed" else None
            raise TrainingFailed(f"{layout.name}: the trainer failed\n{told or said}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = folder / "checkpoints" / f"checkpoint-{layout.legs[-1].until}"
    run.inputs.model.load_state_dict(load_file(last / "model.safetensors"))
    loss, grad_norm, rate = (
        np.asarray([line[key] for line in lines]) for key in ("loss", "grad_norm", "learning_rate")
    )
    trace = Trace(loss, grad_norm, rate, flat(load_file(last / "optimizer.safetensors")), fixed_logits(run))
    shutil.rmtree(folder)  # weights and optimizer of a large model, for every layout
    return trace


def table(
    name: str, steps: int, differences: dict[Layout, dict[str, float]], spread: dict[str, float], *, agrees: bool
) -> str:
    """What people read."""
    limits = allowed(spread)
    heads = [key.replace("_", " ") for key in TOLERANCE]
    wide = max(len(title) for title in (REORDERED, *(layout.name for layout in differences)))

    def line(title: str, found: dict[str, float]) -> str:
        shown = (f"{found[key]:.1e}{'!' if found[key] > limits[key] else ' '}" for key in TOLERANCE)
        cells = (f"{cell:>{max(len(head) + 1, 9)}}" for head, cell in zip(heads, shown, strict=True))
        return " ".join([f"{title:<{wide}}", *cells]).rstrip()

    lines = [f"{name}, steps 1 to {steps}, float32: largest relative difference from 1 process on the CPU", ""]
    lines += [" ".join([" " * wide, *(f"{head:>{max(len(head), 8)}} " for head in heads)]).rstrip()]
    lines += [line(layout.name, found) for layout, found in differences.items()]
    lines += ["", line(REORDERED, spread), line("allowed", limits)]
    lines += ["", "the same training" if agrees else "NOT the same training: what is marked with ! is beyond rounding"]
    return "\n".join(lines)


def report(
    name: str,
    steps: int,
    reference: Trace,
    differences: dict[Layout, dict[str, float]],
    spread: dict[str, float],
    *,
    agrees: bool,
) -> dict[str, Any]:
    """What programs read."""
    return {
        "recipe": name,
        "steps": steps,
        "agrees": agrees,
        "allowed": allowed(spread),
        "summed_in_reverse": spread,
        "layouts": [{**asdict(layout), **found} for layout, found in differences.items()],
        "reference": {"loss": reference.loss.tolist(), "grad_norm": reference.grad_norm.tolist()},
        "versions": hardware.versions(),
    }

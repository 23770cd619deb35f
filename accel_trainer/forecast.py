"""What a run will take, told before it runs: `accel-trainer plan RECIPE`.

Steps, tokens, padding and disk are counted: the first epoch is divided as the run will divide it. Memory is expected (`memory`).
Time is measured (`speed`). `forecast_table` prints all of it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from accel_trainer import device_memory, hardware
from accel_trainer.accelerate_config import AccelerateConfig
from accel_trainer.batching import divide_split, token_budget
from accel_trainer.data import Split
from accel_trainer.feed import StepSize
from accel_trainer.finishing import SCORED
from accel_trainer.inputs import Inputs, read_inputs
from accel_trainer.launching import LAUNCH_VARIABLES
from accel_trainer.memory import Extent, MemoryNeeds, optimizer_bytes, training_needs
from accel_trainer.model import count_parameters
from accel_trainer.plan import TrainingPlan
from accel_trainer.recipe import Recipe
from accel_trainer.run import Run, prepare
from accel_trainer.run_folder import RunFolder
from accel_trainer.signals import interrupted_by_signals
from accel_trainer.speed import Speed, measure
from accel_trainer.terminal import gib
from accel_trainer.tracking import quieten_libraries

# Bytes of a line of predictions: beside text and probabilities, of each probability, of the text of each token. Assumptions.
ROW_BYTES, LABEL_BYTES, TOKEN_BYTES = 120, 40, 5


@dataclass(frozen=True)
class Target:
    """The hardware that a run is forecast for."""

    config: Path | None  # that says so; None where none does
    num_processes: int
    device: str  # cpu, cuda, …
    is_here: bool  # this machine has such a device
    mixed_precision: str
    sharded: bool  # weights, gradients and optimizer are shared out over the processes
    memory: int | None  # bytes of a process's device, or its share of the machine; None where that is not here


@dataclass(frozen=True)
class RoleSize:
    """One role's rows."""

    rows: int
    tokens: int
    longest: int  # tokens
    truncated: int  # rows that were cut


@dataclass(frozen=True)
class Steps:
    """The steps of the first epoch, or of a shorter run, as they will be divided."""

    sizes: list[StepSize]
    micro_batches: list[int]  # of each process
    activations: int  # bytes at most that one takes, on one process

    def mean(self, of: Callable[[StepSize], int]) -> float:
        """Mean of a size over the steps."""
        return sum(map(of, self.sizes)) / len(self.sizes)

    @property
    def padding_avoided(self) -> float:
        """Share that is not computed of what padding each global batch to its longest text would."""
        return 1 - self.mean(lambda size: size.positions) / self.mean(lambda size: size.padded_positions)


@dataclass(frozen=True)
class Seconds:
    """What a run will take on one process of this machine."""

    training: float
    evaluation: float
    saving: float | None  # None where nothing can be written


@dataclass(frozen=True)
class Disk:
    """Bytes that a run will write and keep, at their most."""

    checkpoints: int  # one more than is kept is there while the oldest is not yet deleted
    best: int  # the new one beside the old one
    model: int
    predictions: int
    folder: Path  # where they will lie, or the nearest above it that is there
    free: int
    problem: str  # why nothing can be written there; empty where it can

    @property
    def total(self) -> int:
        """All of it."""
        return self.checkpoints + self.best + self.model + self.predictions


@dataclass(frozen=True)
class Forecast:
    """What a run will take."""

    recipe: Recipe
    plan: TrainingPlan
    target: Target
    roles: dict[str, RoleSize]
    parameters: dict[str, int]
    packed: bool
    max_tokens: int  # of a micro-batch
    budget_is_assumed: bool  # they neither were given nor follow from the memory of a device
    steps: Steps
    needs: MemoryNeeds
    program: int  # bytes that Python and the libraries take on a CPU, before anything is read
    evaluation: int  # bytes at most that a micro-batch of an evaluation takes
    seconds: Seconds | None
    unmeasured: str  # why there are no seconds
    disk: Disk
    notes: list[str]

    @property
    def memory(self) -> int:
        """Bytes that training takes on each device, at their most."""
        return self.program + self.needs.state + max(self.steps.activations, self.evaluation - self.needs.gradients)

    def warnings(self) -> list[str]:
        """What speaks against starting the run as it is."""
        plan, seconds, found = self.plan, self.seconds, []
        if self.target.memory is not None and self.memory > self.target.memory:
            found.append(
                f"{gib(self.memory)} will not fit into {gib(self.target.memory)} of memory; use --gradient_checkpointing, a "
                "smaller --max_tokens_per_device, a shorter dataset.max_length or a smaller checkpoint"
            )
        if self.disk.problem:
            found.append(
                f"nothing can be written to {self.disk.folder} ({self.disk.problem}); choose another --output_dir"
            )
        elif self.disk.total > self.disk.free:
            found.append(
                f"{gib(self.disk.total)} will not fit on the disk, where {gib(self.disk.free)} are free; choose another "
                "--output_dir, or set saving.save_total_limit"
            )
        if seconds is not None and seconds.evaluation > seconds.training:
            found.append(
                "evaluating takes longer than training; set evaluation.eval_steps higher, or dataset.max_eval_samples"
            )
        if plan.warmup_steps == plan.total_steps:
            found.append("the run is all warm-up; lower training.warmup_steps")
        if plan.total_steps < plan.logging_steps:
            found.append(
                f"the run ends before step {plan.logging_steps}, the first that is logged; lower tracking.logging_steps"
            )
        return found


def forecast(
    recipe: Recipe,
    config: AccelerateConfig | None = None,
    *,
    output_dir: Path = Path("runs"),
    layout: str = "auto",
    max_tokens_per_device: int | None = None,
    gradient_checkpointing: bool = False,
    measures: bool = True,
    trust_remote_code: bool = False,
) -> Forecast:
    """What a run of a recipe will take.

    Args:
        recipe: read and checked.
        config: of the launch, see `accelerate_config.of_launch`; None: one process here.
        output_dir: where the run will be written, or a folder above it.
        layout: as the trainer's option.
        max_tokens_per_device: as the trainer's option.
        gradient_checkpointing: as the trainer's option.
        measures: take a few steps to learn how long the run will take.
        trust_remote_code: run code that the checkpoint's repository holds.

    Raises:
        UserError: recipe, data, model or options are not as they should be.
        OutOfMemory: a micro-batch does not even fit where time is measured.
        Interrupted: a signal came; nothing is left.
    """
    quieten_libraries()
    program = device_memory.resident_memory()
    is_here = config is None or config.use_cpu or torch.accelerator.is_available()
    silent = recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"report_to": []})})
    inputs = read_inputs(silent, trust_remote_code=trust_remote_code)
    disk = _existing(output_dir)
    with (
        interrupted_by_signals(resumable=False),
        launched_alone(config if is_here else None),
        tempfile.TemporaryDirectory(prefix="accel-trainer-plan-") as place,
    ):
        run = prepare(
            hardware.start_accelerator(),
            inputs,
            RunFolder(Path(place)),
            layout=layout,
            max_tokens_per_device=max_tokens_per_device,
            gradient_checkpointing=gradient_checkpointing,
        )
        target = target_of(run, config, is_here=is_here)
        needs = needs_of(run, target)
        longest = int(run.feed.split.tokens.lengths.max())
        run.max_tokens = max_tokens_per_device or token_budget(target.device, target.memory, *needs.budget(longest))
        steps = divide_steps(run, target, needs)
        speed, unmeasured = None, "" if measures else "--no_measure"
        if not is_here:
            unmeasured = "this machine has no such device"
        if not unmeasured:
            role = next(iter(scored(inputs)), "train")
            speed = measure(run, inputs.splits[role].tokens, disk)
    weights, roles = checkpoint_weights(inputs.model), {role: size_of(split) for role, split in inputs.splits.items()}
    optimizer = optimizer_bytes(inputs.model.parameters(), recipe.training.optim)  # in a file it is whole
    written = disk_needs(run, roles, weights, optimizer, disk)
    return Forecast(
        recipe=recipe,
        plan=run.plan,
        target=target,
        roles=roles,
        parameters=count_parameters(inputs.model),
        packed=run.packed,
        max_tokens=run.max_tokens,
        budget_is_assumed=max_tokens_per_device is None and target.memory is None,
        steps=steps,
        needs=needs,
        program=program if target.device == "cpu" else 0,
        evaluation=evaluation_bytes(run, target, needs),
        seconds=None if speed is None else seconds_of(run, steps, roles, speed, weights, optimizer),
        unmeasured=unmeasured,
        disk=written,
        notes=inputs.notes,
    )


@contextmanager
def launched_alone(config: AccelerateConfig | None) -> Iterator[None]:
    """Let an Accelerator that is made in the block be alone, on the device and in the precision of a config."""
    before = dict(os.environ)
    for name in before:
        # Without a config what the user tells Accelerate itself holds.
        if name.startswith(LAUNCH_VARIABLES) and not (config is None and name.startswith("ACCELERATE_")):
            del os.environ[name]
    if config is not None:
        os.environ["ACCELERATE_USE_CPU"] = str(config.use_cpu).lower()
        os.environ["ACCELERATE_MIXED_PRECISION"] = config.mixed_precision
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def target_of(run: Run, config: AccelerateConfig | None, *, is_here: bool) -> Target:
    """The hardware that a config asks for; `run` is prepared on this machine's."""
    accelerator = run.accelerator
    here, memory = accelerator.device.type, device_memory.smallest_memory(accelerator)
    if config is None:
        return Target(None, 1, here, is_here, accelerator.mixed_precision, False, memory)
    if here == "cpu" and memory is not None:
        memory //= -(-config.num_processes // config.num_machines)
    device = here if is_here else "cuda"  # which one does not matter: it is not here
    memory = memory if is_here else None
    sharded = config.distributed_type == "FSDP"
    return Target(config.path, config.num_processes, device, is_here, config.mixed_precision, sharded, memory)


def needs_of(run: Run, target: Target) -> MemoryNeeds:
    """Memory that a process of the target takes."""
    return training_needs(
        run.accelerator.unwrap_model(run.model),
        run.inputs.recipe.training.optim,
        int(run.feed.split.tokens.lengths.max()),
        packed=run.packed,
        num_processes=target.num_processes,
        mixed_precision=target.mixed_precision,
        sharded=target.sharded,
    )


def divide_steps(run: Run, target: Target, needs: MemoryNeeds) -> Steps:
    """Divide the first epoch, or a shorter run, as the target's processes will."""
    feed = replace(run.feed, num_processes=target.num_processes)
    costs = feed.split.tokens.costs(packed=run.packed)
    sizes, counts, largest = [], [], 0
    for step in range(min(run.plan.total_steps, run.plan.steps_per_epoch)):
        rows, divided = feed.divide(step, run.max_tokens)
        sizes.append(feed.size(rows, divided))
        counts.append(len(divided[0]))
        extents = (Extent.of(costs[rows[part.indices]], packed=run.packed) for parts in divided for part in parts)
        largest = max(largest, *map(needs.activations, extents))
    return Steps(sizes, counts, largest)


def evaluation_bytes(run: Run, target: Target, needs: MemoryNeeds) -> int:
    """Bytes at most that a micro-batch of an evaluation takes."""
    largest = 0
    for role in scored(run.inputs):
        costs = run.inputs.splits[role].tokens.costs(packed=run.packed)
        divided = divide_split(costs, target.num_processes, run.max_tokens, packed=run.packed)
        extents = (Extent.of(costs[part.indices], packed=run.packed) for parts in divided for part in parts)
        largest = max(largest, *map(needs.evaluation, extents))
    return largest


def scored(inputs: Inputs) -> list[str]:
    """Roles that are evaluated at the end."""
    return [role for role in SCORED if role in inputs.splits]


def size_of(split: Split) -> RoleSize:
    """The size of a role."""
    tokens = split.tokens
    return RoleSize(len(split), int(tokens.lengths.sum()), int(tokens.lengths.max()), tokens.truncated)


def checkpoint_weights(model: nn.Module) -> int:
    """Bytes of a model's weights in a file."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


# --- time


def seconds_of(
    run: Run, steps: Steps, roles: dict[str, RoleSize], speed: Speed, weights: int, optimizer: int
) -> Seconds:
    """What the whole run takes at a speed."""
    plan = run.plan
    of_step = steps.mean(lambda size: size.positions) * speed.position + speed.update
    evaluated = sum(roles[role].tokens for role in scored(run.inputs))
    if plan.eval_every is not None:
        evaluated += moments(plan.total_steps, plan.eval_every) * roles["validation"].tokens
    best = 0 if plan.eval_every is None else moments(plan.total_steps, plan.eval_every)  # at most: each the best so far
    saved = 0 if plan.save_every is None else moments(plan.total_steps, plan.save_every)
    written = saved * (weights + optimizer) + (best + 1) * weights
    saving = None if speed.saving is None else written / speed.saving
    return Seconds(plan.total_steps * of_step, evaluated * speed.token, saving)


def moments(steps: int, every: int) -> int:
    """How often something happens that is due every so many steps and after the last."""
    return -(-steps // every)


# --- disk


def disk_needs(run: Run, roles: dict[str, RoleSize], weights: int, optimizer: int, folder: Path) -> Disk:
    """What a run writes and keeps."""
    plan, limit = run.plan, run.inputs.recipe.saving.save_total_limit
    saved = 0 if plan.save_every is None else moments(plan.total_steps, plan.save_every)
    evaluated = 0 if plan.eval_every is None else moments(plan.total_steps, plan.eval_every)
    row = ROW_BYTES + LABEL_BYTES * len(run.inputs.label_names)
    return Disk(
        checkpoints=min(saved, saved if limit is None else limit + 1) * (weights + optimizer),
        best=min(evaluated, 2) * weights,
        model=weights,
        predictions=sum(roles[role].rows * row + roles[role].tokens * TOKEN_BYTES for role in scored(run.inputs)),
        folder=folder,
        free=shutil.disk_usage(folder).free,
        problem=_problem(folder),
    )


def _existing(folder: Path) -> Path:
    """A folder, or the nearest above it that is there."""
    folder = folder.absolute()
    with suppress(OSError):  # the one above it may not be looked into
        if folder.is_dir():
            return folder
    return _existing(folder.parent)


def _problem(folder: Path) -> str:
    """Why nothing can be written to a folder; empty where it can."""
    try:
        with tempfile.TemporaryDirectory(prefix=".accel-trainer-plan-", dir=folder):
            return ""
    except OSError as error:
        return error.strerror or type(error).__name__

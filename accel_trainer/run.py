"""A run: what is prepared on its hardware, how far it is, and what it writes and reads back."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from accel_trainer import artifacts, checkpoint, collectives, device_memory, git_version, hardware, xla
from accel_trainer.classifier import Classifier
from accel_trainer.collectives import gather_object
from accel_trainer.differences import flat
from accel_trainer.errors import RunFolderError, UserError
from accel_trainer.feed import Feed, StepWork
from accel_trainer.inputs import Inputs, mathematics
from accel_trainer.layout import choose_layout, has_few_shapes
from accel_trainer.memory import training_needs
from accel_trainer.model import count_parameters
from accel_trainer.optim import build_optimizer, build_scheduler, parameter_groups, state_by_name
from accel_trainer.origin import Origin
from accel_trainer.plan import TrainingPlan
from accel_trainer.recipe_file import to_yaml
from accel_trainer.redaction import without_secrets
from accel_trainer.run_folder import RunFolder, write_json, write_text
from accel_trainer.shapes import Shape
from accel_trainer.sharding import gathered, make_ready, shards, share
from accel_trainer.tokenization import Tokens, tokenizer_sha256
from accel_trainer.tracking import logger, start_trackers, track


@dataclass
class TrainerState:
    """How far a run is. Saved with every checkpoint, as JSON."""

    step: int = 0
    tokens: int = 0  # real tokens trained on
    positions: int = 0  # tokens computed, see `feed.StepSize`
    padded_positions: int = 0  # what padding every global batch to its longest example would have computed
    loss_sum: float = 0.0  # over all processes, since the last logged line
    examples: int = 0  # likewise
    best_metric: float | None = None
    best_step: int | None = None
    evaluated_step: int = 0  # after which the validation split was evaluated last
    evaluations_since_best: int = 0
    stopped_early: bool = False
    overflows: int = 0  # fp16 only: steps repeated with a smaller scale
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "evaluate": 0.0, "save": 0.0})

    def add(self, done: StepStatistics) -> None:
        """Count a step that was taken; its loss is added when it is read from the device."""
        self.step += 1
        self.tokens += done.work.tokens
        self.positions += done.work.positions
        self.padded_positions += done.work.padded_positions
        self.examples += done.work.examples


@dataclass(frozen=True)
class StepStatistics:
    """What one optimizer step computed."""

    loss_sum: Tensor  # scalar, plain sum of this process's example losses
    grad_norm: Tensor  # scalar, of the whole global batch, before clipping
    learning_rate: float  # that the update used; of the head, where layers learn at rates of their own
    work: StepWork


@dataclass
class Run:
    """What `fit` works with: everything prepared, on its device."""

    accelerator: Accelerator
    inputs: Inputs
    plan: TrainingPlan
    folder: RunFolder
    model: nn.Module
    optimizer: Optimizer
    scheduler: LambdaLR
    state: TrainerState
    feed: Feed
    max_tokens: int  # of a micro-batch

    @property
    def packed(self) -> bool:
        """Whether the examples of a micro-batch stand in one row, without padding."""
        return self.feed.packed

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)


def prepare(
    accelerator: Accelerator,
    inputs: Inputs,
    folder: RunFolder,
    *,
    layout: str = "auto",
    max_tokens_per_device: int | None = None,
    gradient_checkpointing: bool = False,
) -> Run:
    """Put model and optimizer on their device, wrapped as the accelerate config says, and open the trackers.

    Args:
        accelerator: the run's.
        inputs: read and checked.
        folder: where the run is written.
        layout: `packed`, `padded`, or `auto`: packed where that is possible.
        max_tokens_per_device: token budget of a micro-batch; None: derived from the device.
        gradient_checkpointing: compute activations twice instead of keeping them.

    Raises:
        UserError: the model cannot be trained so.
    """
    recipe = inputs.recipe
    plan = TrainingPlan.of(recipe, len(inputs.splits["train"]))
    if gradient_checkpointing:
        if xla.computes_on(accelerator.device):  # torch_xla's own leaves layers above frozen ones without gradient
            raise UserError("--gradient_checkpointing: torch has none for XLA devices; leave the option out")
        try:
            inputs.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise UserError(f"--gradient_checkpointing: {error} Leave the option out") from error
    classifier = Classifier(inputs.model)
    with collectives.together(accelerator):
        packed = choose_layout(classifier, inputs.splits["train"], layout, accelerator.device)
    packed = all(gather_object([packed]))  # a trial could end differently on another machine
    longest = int(inputs.splits["train"].tokens.lengths.max())
    needs = (0, 1)  # of no use where the command line gives the budget
    if (
        max_tokens_per_device is None
    ):  # before it is prepared: a process of sharded weights could not try its model alone
        needs = training_needs(
            classifier,
            recipe.training.optim,
            longest,
            packed=packed,
            num_processes=accelerator.num_processes,
            mixed_precision=accelerator.mixed_precision,
            sharded=shards(accelerator),
        ).budget(longest)
    max_tokens = device_memory.tokens_per_device(accelerator, needs, max_tokens_per_device)
    groups = parameter_groups(inputs.model, recipe.training)
    optimizer = build_optimizer(groups, recipe.training, accelerator.device, sharded=shards(accelerator))
    # The schedule stays unprepared: Accelerate's wrapper would move it once per process and update.
    scheduler = build_scheduler(optimizer, recipe.training, plan)
    if shards(accelerator):
        make_ready(accelerator, classifier)
    model, prepared = accelerator.prepare(classifier, optimizer)
    if recipe.tracking.report_to:
        settings = {key: without_secrets(str(value)) for key, value in flat(recipe.model_dump(mode="json")).items()}
        start_trackers(accelerator, recipe.tracking.project_name, settings)
    return Run(
        accelerator=accelerator,
        inputs=inputs,
        plan=plan,
        folder=folder,
        model=model,
        optimizer=prepared,
        scheduler=scheduler,
        state=TrainerState(),
        feed=Feed(
            split=inputs.splits["train"],
            training=recipe.training,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
            packed=packed,
            device=accelerator.device,
            few_shapes=has_few_shapes(accelerator.device, packed=packed),
        ),
        max_tokens=max_tokens,
    )


def write_run_json(run: Run, origin: Origin | None = None) -> None:
    """Write recipe.yaml and run.json: what is about to be done, on what, and with which versions.

    Args:
        run: prepared.
        origin: where its recipe stands; None for one that stands in no file.
    """
    facts = hardware.describe(run.accelerator)
    if not run.is_main:
        return
    inputs, plan = run.inputs, run.plan
    counts = count_parameters(inputs.model)
    header = f"Resolved recipe of a run of accel_trainer {hardware.versions()['accel_trainer']}; it runs as it stands."
    write_text(run.folder.recipe, to_yaml(inputs.recipe, header=header))
    write_json(
        run.folder.run,
        {
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "recipe": None if origin is None else origin.as_dict(),
            "hardware": facts,
            "layout": "packed" if run.packed else "padded",
            **({"shapes": all_shapes(run)} if run.feed.few_shapes else {}),
            "max_tokens_per_device": run.max_tokens,
            "versions": hardware.versions(),
            "git_commit": git_version.commit(Path.cwd()),
            "plan": plan.as_dict(),
            "parameters": counts,
            "initial_weights_sha256": inputs.initial_sha256,
            "tokenizer_sha256": tokenizer_sha256(inputs.tokenizer),
            "labels": inputs.label_names,
            "dataset": {
                role: {
                    "rows": len(split),
                    "sha256": split.rows.sha256,
                    "tokens": int(split.tokens.lengths.sum()),
                    "truncated": split.tokens.truncated,
                }
                for role, split in inputs.splits.items()
            },
            "notes": [without_secrets(note) for note in inputs.notes],
        },
    )
    logger.info(
        "%d examples, %d steps of %d (%d an epoch), %s of %s parameters trained; %d process%s on %s, precision %s, %s",
        plan.num_examples,
        plan.total_steps,
        plan.global_batch_size,
        plan.steps_per_epoch,
        f"{counts['trainable']:,}",
        f"{counts['total']:,}",
        facts["num_processes"],
        "" if facts["num_processes"] == 1 else "es",
        facts["device"],
        hardware.precision_named(facts["mixed_precision"]),
        "packed without padding" if run.packed else "padded",
    )


def shapes_of(run: Run, tokens: Tokens) -> list[Shape] | None:
    """The few shapes that micro-batches have when logits of these rows are computed; None: any."""
    processes = run.accelerator.num_processes
    return tokens.shapes(len(tokens), processes, run.max_tokens) if run.feed.few_shapes else None


def all_shapes(run: Run) -> dict[str, list[Shape] | None]:
    """Rows and columns of the micro-batches that each split is computed in, where they are few: XLA compiles each once."""
    evaluated = {role: split.tokens for role, split in run.inputs.splits.items() if role != "train"}
    shapes = {role: shapes_of(run, tokens) for role, tokens in evaluated.items()}
    return {"training": run.feed.shapes(run.max_tokens), **shapes}


def amend_run_json(run: Run, **facts: Any) -> None:
    """Write into run.json what has become known, or different, since."""
    if run.is_main:
        before = json.loads(run.folder.run.read_text(encoding="utf-8"))
        write_json(run.folder.run, before | facts)


@contextmanager
def compilations_noted(run: Run) -> Iterator[None]:
    """Write into run.json how many graphs the main process has compiled on XLA by the end of the block, however it ends."""
    try:
        yield
    finally:
        if run.is_main and xla.computes_on(run.accelerator.device):
            count = xla.compilations()
            logger.info("%d graphs compiled", count)
            with suppress(RunFolderError, OSError):  # what ends the run is to be told, not this
                amend_run_json(run, compilations=count)


def record(run: Run, line: dict[str, Any]) -> None:
    """Write a line to metrics.jsonl and to the trackers."""
    if not run.is_main:
        return
    run.folder.append_metrics(line)
    prefix = f"{line['split']}/" if "split" in line else "train/"
    values = {prefix + name: value for name, value in line.items() if name not in ("step", "split")}
    track(run.accelerator, values, line["step"])


def whole_weights(run: Run) -> dict[str, Tensor]:
    """All weights under the stock model's names. Collective: every process must call it."""
    weights = run.accelerator.get_state_dict(run.model)
    # torch.compile, then Classifier, put theirs in front
    return {name.removeprefix("_orig_mod.").removeprefix("model."): weight for name, weight in weights.items()}


def optimizer_state(run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and plain values of the optimizer, by the names of the stock model's parameters. Collective.

    What lies in shares is whole on the main process, and left out on others: counts of steps are there on all.
    """
    tensors, values = state_by_name(inner_optimizer(run.optimizer), run.inputs.model)
    return gathered(tensors, keep=run.is_main), values


def received(run: Run, tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """What each process holds of weights or optimizer state that the main process read: all of it, or its shares. Collective.

    Args:
        run: prepared.
        tensors: by the names of the stock model's weights, an entry of the optimizer after a space; None on other processes.
    """
    held = run.inputs.model.state_dict()

    def keep(name: str, tensor: Tensor) -> Tensor:
        return share(tensor, held[name.partition(" ")[0]]) if tensor.dim() else tensor  # a count of steps is everyone's

    return collectives.tensors_from_main_process(run.accelerator, tensors, keep)


def write_model(run: Run, folder: Path, scores: dict[str, dict[str, float]], step: int) -> None:
    """Write the current weights, those of `step`, as a folder that transformers loads. Collective."""
    weights = whole_weights(run)
    with collectives.together(run.accelerator):
        if run.is_main:
            card = artifacts.model_card(run.inputs.recipe, run.inputs.label_names, step, scores)
            artifacts.save_model(folder, run.inputs.model, weights, run.inputs.tokenizer, card, step)
    run.accelerator.wait_for_everyone()  # nobody reads it before it is whole


def write_best(run: Run, scores: dict[str, float]) -> None:
    """Keep the current weights as the best so far. Collective: every process must call it.

    Those that the last checkpoint calls best stay beside them until the next checkpoint is written: a run that is killed
    in between goes on from the last one, and must find what it remembers.
    """
    folder = run.folder
    with collectives.together(run.accelerator):
        if run.is_main and folder.best.exists() and not folder.best_before.exists() and folder.checkpoints.exists():
            folder.best.rename(folder.best_before)
    write_model(run, run.folder.best, {"validation": scores}, run.state.step)


def save(run: Run) -> None:
    """Write a checkpoint and delete the oldest. Collective: every process must call it."""
    started = time.perf_counter()
    weights = whole_weights(run)
    tensors, values = optimizer_state(run)
    scaler = run.accelerator.scaler
    trainer_state = {
        "state": asdict(run.state),
        "optimizer_values": values,
        "scaler": None if scaler is None else scaler.state_dict(),
        "mathematics": mathematics(run.inputs),
        "num_processes": run.accelerator.num_processes,
        "max_tokens_per_device": run.max_tokens,
    }
    with collectives.together(run.accelerator):  # a full disk ends all of them, with the message
        if run.is_main:
            run.folder.check_held()
            checkpoint.save_checkpoint(run.folder.checkpoints, run.state.step, weights, tensors, trainer_state)
            run.folder.forget_token_budget()
            shutil.rmtree(run.folder.best_before, ignore_errors=True)
            checkpoint.rotate(run.folder.checkpoints, run.inputs.recipe.saving.save_total_limit, run.state.step)
            run.folder.set_status("running", run.state.step)
    run.accelerator.wait_for_everyone()
    run.state.seconds["save"] += time.perf_counter() - started


def throughput(run: Run) -> dict[str, Any]:
    """Speed of the optimizer steps; evaluating and saving are counted apart."""
    state, plan = run.state, run.plan
    seconds = state.seconds["train"]
    epochs, rest = divmod(state.step, plan.steps_per_epoch)
    examples = epochs * plan.num_examples + min(rest * plan.global_batch_size, plan.num_examples)
    return {
        "train_runtime": seconds,
        "train_samples_per_second": examples / seconds if seconds else None,
        "train_steps_per_second": state.step / seconds if seconds else None,
        "train_tokens_per_second": state.tokens / seconds if seconds else None,
        "steps": state.step,
        "epochs": plan.epoch(state.step),
        "examples": examples,
        "tokens": state.tokens,
        "padding_avoided": 1 - state.positions / state.padded_positions if state.padded_positions else 0.0,
        "evaluation_runtime": state.seconds["evaluate"],
        "saving_runtime": state.seconds["save"],
        "overflows": state.overflows,
        "best_step": state.best_step,
        "best_metric": state.best_metric,
        "stopped_early": state.stopped_early,
    }


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself, without Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)

"""A run: what is prepared on its hardware, how far it is, and what it writes and reads back."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from accel_trainer import artifacts, checkpoint, collectives, device_memory, git_version, hardware, rendezvous, xla
from accel_trainer.batching import smaller_budget
from accel_trainer.classifier import Classifier
from accel_trainer.collectives import gather_object
from accel_trainer.differences import differences, flat, in_groups
from accel_trainer.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER_MISTAKE,
    AccelTrainerError,
    Interrupted,
    OutOfMemory,
    ProcessLost,
    RunFolderError,
    TrainingFailed,
    UserError,
)
from accel_trainer.feed import Feed, StepWork
from accel_trainer.inputs import Inputs, mathematics
from accel_trainer.layout import choose_layout
from accel_trainer.memory import training_needs
from accel_trainer.model import count_parameters
from accel_trainer.optim import (
    build_optimizer,
    build_scheduler,
    load_state_by_name,
    parameter_groups,
    state_by_name,
)
from accel_trainer.origin import Origin
from accel_trainer.plan import TrainingPlan
from accel_trainer.recipe_file import to_yaml
from accel_trainer.redaction import without_secrets
from accel_trainer.run_folder import LAST_WORDS, RunFolder, write_json, write_text
from accel_trainer.shapes import Shape, choose_shapes
from accel_trainer.sharding import gathered, make_ready, shards, share
from accel_trainer.tokenization import tokenizer_sha256
from accel_trainer.tracking import logger, start_trackers, track


@dataclass
class TrainerState:
    """How far a run is. Saved with every checkpoint, as JSON."""

    step: int = 0
    tokens: int = 0  # real tokens trained on
    positions: int = 0  # real and padding tokens computed
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
            few_shapes=xla.computes_on(accelerator.device) and not packed,
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
            **({"shapes": shapes_of(run)} if run.feed.few_shapes else {}),
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


def shapes_of(run: Run) -> dict[str, list[Shape]]:
    """Rows and columns of the micro-batches that each split is computed in, where they are few: XLA compiles each once."""
    training = {"training": run.feed.shapes(run.max_tokens)}
    processes = run.accelerator.num_processes
    return training | {
        role: choose_shapes(split.tokens.lengths, len(split), processes, run.max_tokens)
        for role, split in run.inputs.splits.items()
        if role != "train"
    }


def note_compilations(run: Run) -> None:
    """Write into run.json how many graphs the main process compiled, on XLA: no more for the length of a run."""
    if run.is_main and xla.computes_on(run.accelerator.device):
        facts = json.loads(run.folder.run.read_text(encoding="utf-8"))
        write_json(run.folder.run, facts | {"compilations": xla.compilations()})


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

    Shares are whole on the main process, and left out on others.
    """
    tensors, values = state_by_name(_inner(run.optimizer), run.inputs.model)
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


def settle_best(run: Run) -> None:
    """After a restore, let `best/` hold the weights that the state calls best; if they are gone, forget them and say so."""
    folder, wanted, found = run.folder, run.state.best_step, True
    with collectives.together(run.accelerator):
        if run.is_main:
            if folder.weights_step(folder.best) != wanted:
                shutil.rmtree(folder.best, ignore_errors=True)  # of steps that are about to be taken again
                if wanted is not None and folder.weights_step(folder.best_before) == wanted:
                    folder.best_before.rename(folder.best)
            shutil.rmtree(
                folder.best_before, ignore_errors=True
            )  # what is left there is older than the last checkpoint
            found = wanted is None or folder.weights_step(folder.best) == wanted
    if not gather_object([found])[0]:  # as the main process sees it: one that thought otherwise would wait for ever
        logger.warning(
            "the best weights so far, of step %d, are no longer in %s: the best from here on are kept",
            wanted,
            folder.best,
        )
        run.state.best_metric = run.state.best_step = None


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


# Entries of trainer_state.json → their types.
SAVED: dict[str, Any] = {
    "state": dict,
    "optimizer_values": dict,
    "scaler": dict | None,
    "mathematics": dict,
    "max_tokens_per_device": int,
}


def check_state(path: Path, saved: dict[str, Any]) -> None:
    """See that the state of a checkpoint is one that this version can go on from.

    Raises:
        RunFolderError: it is not.
    """
    strange = [name for name, kind in SAVED.items() if not isinstance(saved.get(name, ...), kind)]
    if "state" not in strange:
        strange += sorted(set(saved["state"]) - {entry.name for entry in fields(TrainerState)})
        strange += [] if isinstance(saved["state"].get("step"), int) else ["step"]
    if strange:
        raise RunFolderError(
            f"{path}: this version cannot go on from what trainer_state.json says of {', '.join(strange)}; use another checkpoint"
        )


def check_same_training(run: Run, path: Path, saved: dict[str, Any], allow_changed: Sequence[str]) -> None:
    """See that a checkpoint is of this run's mathematics, but for the keys that may have changed.

    Raises:
        RunFolderError: it is of another recipe or other data.
    """
    now_in_force = mathematics(run.inputs)
    known = [*flat(saved["mathematics"]), *flat(now_in_force)]
    for allowed in allow_changed:
        if not any(key == allowed or key.startswith(f"{allowed}.") for key in known):
            raise RunFolderError(
                f"--allow_changed {allowed}: there is no such key; name one such as training.learning_rate"
            )
    changed = [
        (key, before, now)
        for key, before, now in differences(saved["mathematics"], now_in_force)
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in allow_changed)
    ]
    if changed:
        raise RunFolderError(
            f"{path} was trained otherwise:\n{in_groups(changed, 'in the checkpoint', 'now')}\n"
            "Restore these values, start afresh in another --output_dir, or name each with --allow_changed KEY"
        )


@dataclass
class Saved:
    """A checkpoint, read."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]  # trainer_state.json


def read_checkpoint(run: Run, path: Path, allow_changed: Sequence[str]) -> Saved:
    """Read a checkpoint that the run can go on from.

    Raises:
        RunFolderError: it is damaged, or of another recipe, other data or another model than the run's.
    """
    weights, tensors, state = checkpoint.load_checkpoint(path)
    check_state(path, state)
    check_same_training(run, path, state, allow_changed)
    shapes = {name: weight.shape for name, weight in run.inputs.model.state_dict().items()}
    if {name: weight.shape for name, weight in weights.items()} != shapes:
        raise RunFolderError(f"{path}: model.safetensors holds the weights of another model; use another checkpoint")
    return Saved(weights, tensors, state)


def restore(run: Run, found: Saved | None, *, keep_token_budget: bool) -> None:
    """Continue from a checkpoint: weights, optimizer, schedule, scaler and state are those of the saved step. Collective.

    Args:
        run: prepared.
        found: what the main process read; on others None, for they may see no disk of its machine.
        keep_token_budget: take the checkpoint's.
    """
    saved = collectives.from_main_process(run.accelerator, None if found is None else found.state)
    weights = received(run, None if found is None else found.weights)
    tensors = received(run, None if found is None else found.optimizer)
    run.inputs.model.load_state_dict(weights)
    load_state_by_name(_inner(run.optimizer), run.inputs.model, tensors, saved["optimizer_values"])
    # Rates are a function of the step and of the recipe as it is now: what was allowed to change takes effect.
    step = saved["state"]["step"]
    rates = [base * at(step) for base, at in zip(run.scheduler.base_lrs, run.scheduler.lr_lambdas, strict=True)]
    moved = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    run.scheduler.load_state_dict({**run.scheduler.state_dict(), **moved})
    for group, rate in zip(_inner(run.optimizer).param_groups, rates, strict=True):
        group["lr"] = rate
    if run.accelerator.scaler is not None and saved["scaler"] is not None:
        run.accelerator.scaler.load_state_dict(saved["scaler"])
    run.state = TrainerState(**saved["state"])
    if keep_token_budget:  # the same micro-batches add up in the same order, to the same bits; but a smaller device
        run.max_tokens = min(run.max_tokens, saved["max_tokens_per_device"])  # must not take a larger one's
        if run.max_tokens < saved["max_tokens_per_device"]:
            logger.info(
                "note: micro-batches of %d tokens, not %d as before: rounding differs. --max_tokens_per_device %d repeats it",
                *(run.max_tokens, saved["max_tokens_per_device"], saved["max_tokens_per_device"]),
            )


def continue_run(run: Run, path: Path | None, allow_changed: Sequence[str], *, keep_token_budget: bool) -> None:
    """Restore the checkpoint at `path`, or the newest sound one; start afresh if there is none.

    Args:
        run: prepared, not started.
        path: a checkpoint, or None.
        allow_changed: keys of the mathematics that may differ from the checkpoint's.
        keep_token_budget: take the checkpoint's, because the command line gives none.

    Raises:
        RunFolderError: the checkpoint is damaged, or of another recipe or other data than the run's.
    """
    found: Saved | None = None
    with collectives.together(run.accelerator):
        if run.is_main:
            path = path or newest_checkpoint(run.folder)
            found = None if path is None else read_checkpoint(run, path, allow_changed)
    steps = collectives.from_main_process(run.accelerator, None if found is None else found.state["state"]["step"])
    with collectives.together(run.accelerator):
        if path is None and not run.is_main and not run.folder.is_shared:
            check_left_behind(run.folder, steps or 0)
    if steps is not None:
        restore(run, found, keep_token_budget=keep_token_budget)
    if keep_token_budget:  # and what a process out of memory asked for
        asked = collectives.from_main_process(run.accelerator, run.folder.token_budget() if run.is_main else None)
        run.max_tokens = min(gather_object([min(run.max_tokens, asked or run.max_tokens)]))
    with collectives.together(run.accelerator):
        if run.is_main:  # before anything that they refer to is changed: whoever is killed now goes on from here again
            checkpoint.abandon_later(run.folder.checkpoints, run.state.step)
    settle_best(run)
    if path is None:
        logger.info("no checkpoint in %s: starting from the beginning", run.folder.path)
    else:
        logger.info("continuing from %s, step %d of %d", path, run.state.step, run.plan.total_steps)
    with collectives.together(run.accelerator):
        if run.is_main:
            run.folder.cut_metrics(run.state.step, run.state.evaluated_step)
    run.accelerator.wait_for_everyone()


def newest_checkpoint(folder: RunFolder) -> Path | None:
    """The newest sound checkpoint, None if there is none; the damaged ones are told of.

    Raises:
        RunFolderError: there are some, and none is sound.
    """
    path, complaints = checkpoint.newest_sound(folder.checkpoints)
    for complaint in complaints:
        logger.warning("%s", complaint)
    if path is None and complaints:
        raise RunFolderError(
            f"{folder.checkpoints}: none of the checkpoints can be gone on from; bring one back, use the version that "
            "wrote them, or start afresh in another --output_dir"
        )
    return path


def check_left_behind(folder: RunFolder, step: int) -> None:
    """See that this machine, which does not share the main process's storage, holds nothing that it lacks.

    Raises:
        RunFolderError: it does: it was the first machine of an earlier launch, perhaps.
    """
    later = [path for saved, path in checkpoint.checkpoints(folder.checkpoints) if saved > step]
    if later:
        raise RunFolderError(
            f"{later[-1]} lies on a machine whose storage the first one does not share, and is later than what lies there "
            f"(step {step}): launch with that machine as the first, copy the checkpoint to it, or move it away"
        )


def find_folder(accelerator: Accelerator, folder: RunFolder) -> bool:
    """Let each process know whether it sees the main process's run folder, on storage that they share. Collective.

    Returns:
        whether all of them do.
    """
    mark = collectives.from_main_process(accelerator, uuid4().hex)
    with ExitStack() as around:
        with collectives.together(accelerator):
            if accelerator.is_main_process:
                around.enter_context(folder.marked(mark))
        folder.is_shared = folder.sees(mark)
        apart = gather_object([not folder.is_shared])  # which also keeps the mark there until all have looked
    if any(apart):
        logger.info(
            "note: %d of %d processes do not see %s: it is written by the first machine alone, and what they need of it is "
            "sent to them",
            sum(apart),
            len(apart),
            folder.path,
        )
    return not any(apart)


@contextmanager
def heard_by_main(accelerator: Accelerator, folder: RunFolder) -> Iterator[None]:
    """Let the main process know why another one ends first, which can say so in no file that they share.

    Raises:
        UserError, Interrupted, TrainingFailed: on the main process, in the place of `ProcessLost`, where the other one told.
    """
    try:
        yield
    except ProcessLost as error:
        end = time.monotonic() + LAST_WORDS
        while accelerator.is_main_process and time.monotonic() < end:
            told = rendezvous.word_left()
            if told:
                if told["max_tokens"] is not None:
                    with suppress(RunFolderError):  # a full disk is not what ends the run
                        folder.set_token_budget(told["max_tokens"])
                ended: type[AccelTrainerError] = {EXIT_INTERRUPTED: Interrupted, EXIT_USER_MISTAKE: UserError}.get(
                    told["exit_code"], TrainingFailed
                )
                raise ended(told["reason"]) from error
            time.sleep(0.05)
        raise
    except BaseException as error:
        if not accelerator.is_main_process:
            own = error if isinstance(error, AccelTrainerError) else None
            rendezvous.leave_word(
                {
                    "exit_code": own.exit_code if own else EXIT_FAILED,
                    "reason": without_secrets(str(own) if own else f"{type(error).__name__}: {error}"),
                    "max_tokens": getattr(error, "max_tokens", None),
                }
            )
        raise


def fail_not_finite(run: Run, step: int, remedy: str) -> NoReturn:
    """End a run whose loss or gradient is no number any more, with the rows of that step in a file. On every process.

    Args:
        run: at that step, or some steps after it.
        step: counted from 1.
        remedy: what often helps.

    Raises:
        TrainingFailed: always; what was saved is kept.
    """
    rows, _ = run.feed.divide(step - 1, run.max_tokens)
    if run.is_main:
        split = run.inputs.splits["train"]
        named = artifacts.named_rows(split, run.inputs.recipe.dataset, rows, run.inputs.label_names)
        write_json(run.folder.not_finite, {"step": step, "epoch": run.plan.epoch(step), "rows": named})
    saved = checkpoint.checkpoints(run.folder.checkpoints)
    raise TrainingFailed(
        f"the loss or the gradient of step {step} is not finite (NaN or infinite); the rows of that global batch are in "
        f"{run.folder.not_finite}. {remedy} "
        + (
            f"The checkpoint of step {saved[-1][0]} is kept: --resume training.learning_rate=… --allow_changed "
            "training.learning_rate goes on from it at another rate"
            if saved
            else "No checkpoint was saved yet: start afresh in another --output_dir"
        )
    )


def halve_token_budget(run: Run, error: OutOfMemory) -> None:
    """Answer to a micro-batch that does not fit: a process alone goes on with half the budget, several start again with it.

    Raises:
        OutOfMemory: one example alone does not fit; or there are other processes, which wait in a collective by now, so
            that this one can only end and leave the halved budget for `--resume`.
    """
    if error.examples == 1:
        raise OutOfMemory(
            f"{error}: even single examples do not fit; shorten dataset.max_length, or use --gradient_checkpointing, a smaller "
            "checkpoint or a larger device. The last checkpoint is kept"
        ) from error
    run.max_tokens = smaller_budget(run.max_tokens, error.tokens)
    if run.accelerator.num_processes == 1:
        logger.warning("out of memory: going on with micro-batches of %d tokens (%s)", run.max_tokens, str(error))
        return
    ended = OutOfMemory(
        f"{error}: process {run.accelerator.process_index} of {run.accelerator.num_processes} is out of memory; run the same "
        "line again with --resume (and without --max_tokens_per_device), and it goes on with micro-batches of "
        f"{run.max_tokens} tokens"
    )
    ended.max_tokens = run.max_tokens
    if run.is_main or run.folder.is_shared:
        with suppress(RunFolderError):  # a full disk is not what ends the run
            run.folder.set_token_budget(run.max_tokens)
    raise ended from error


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


def _inner(optimizer: Optimizer) -> Optimizer:
    return getattr(optimizer, "optimizer", optimizer)

"""Train a text classifier from a recipe.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m accel_trainer.train recipes/quickstart.yaml

The way through this file is `main → train → fit → training_step`. The recipe fixes the mathematics: which examples each
optimizer step uses, what they are divided by, when the schedule moves. The accelerate config fixes the hardware. How a
global batch is cut into micro-batches is decided here, and changes nothing but rounding.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from accel_trainer import artifacts, batching, checkpoint, hardware, metrics, order
from accel_trainer.data import LabelledData, Split, load_labelled, tokenise
from accel_trainer.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    AccelTrainerError,
    Interrupted,
    RunFolderError,
    TrainingFailed,
    UserError,
)
from accel_trainer.evaluation import Logits, predict_logits
from accel_trainer.library import find_recipe
from accel_trainer.loss import example_losses
from accel_trainer.model import build_model, count_parameters, load_config, weights_sha256
from accel_trainer.optim import (
    build_optimizer,
    build_scheduler,
    load_state_by_name,
    parameter_groups,
    state_by_name,
)
from accel_trainer.plan import TrainingPlan
from accel_trainer.recipe import Recipe
from accel_trainer.recipe_file import load_recipe, to_yaml
from accel_trainer.run_folder import RunFolder, open_run_folder, write_json, write_text
from accel_trainer.tokenization import load_tokenizer, longest_input, tokenizer_sha256
from accel_trainer.tracking import Progress, logger, speak_on


@dataclass(frozen=True)
class Options:
    """What the command line decides: where, how far at once, and nothing that a gradient depends on."""

    output_dir: Path
    resume: bool = False
    resume_from_checkpoint: Path | None = None
    allow_changed: tuple[str, ...] = ()
    max_tokens_per_device: int | None = None
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Inputs:
    """All that a recipe names, read and checked; the model is on the CPU, in float32, as the seed makes it."""

    recipe: Recipe  # with revisions, hashes and max_length pinned
    splits: dict[str, Split]  # by role
    label_names: list[str]
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    initial_sha256: str
    metrics: dict[str, Any]  # loaded modules by name
    notes: list[str]


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
    evaluations_since_best: int = 0
    stopped_early: bool = False
    overflows: int = 0  # fp16 only: steps repeated with a smaller scale
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "evaluate": 0.0, "save": 0.0})


@dataclass(frozen=True)
class StepStatistics:
    """What one optimizer step computed."""

    loss_sum: Tensor  # scalar, plain sum of this process's example losses
    grad_norm: Tensor  # scalar, of the whole global batch, before clipping
    examples: int  # of the global batch
    tokens: int  # real tokens of the global batch
    positions: int  # real and padding tokens computed for it, fillers left out
    padded_positions: int  # examples × the longest of them
    learning_rate: float  # that the update used; of the head, where layers learn at rates of their own


class GradientOverflow(Exception):
    """fp16 gradients were too large for the scale; the update was skipped."""


class StopRequest:
    """Whether someone asked the run to stop, by SIGTERM or SIGINT; a second signal stops it at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number: int, frame: object) -> None:
        del frame
        self.signal = number
        self.restore()

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to; the same answer on all of them."""
        if accelerator.num_processes == 1:
            return self.signal is not None
        asked = torch.tensor([0.0 if self.signal is None else 1.0], device=accelerator.device)
        return bool(accelerator.reduce(asked, "sum").item() > 0)


def training_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    split: Split,
    recipe: Recipe,
    step: int,
    max_tokens: int,
) -> StepStatistics:
    """Perform optimizer step `step` (counted from 0): one global batch, one update, one move of the schedule.

    Raises:
        GradientOverflow: fp16 gradients overflowed; nothing was updated and the scale is smaller now.
    """
    training = recipe.training
    rows = order.global_batch(
        step, seed=training.seed, num_examples=len(split), global_batch_size=training.global_batch_size
    )
    lengths = split.tokens.lengths[rows]
    divided = batching.divide_batch(lengths, accelerator.num_processes, max_tokens)
    micro_batches = divided[accelerator.process_index]
    seed_dropout(training.seed, step, accelerator.process_index)

    loss_sum = torch.zeros((), device=accelerator.device)
    for i, micro_batch in enumerate(micro_batches):
        taken = rows[micro_batch.indices]
        inputs = {name: value.to(accelerator.device) for name, value in split.tokens.inputs(taken).items()}
        labels = torch.from_numpy(split.rows.labels[taken]).to(accelerator.device)
        is_last = i == len(micro_batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            logits = model(**inputs).logits
            losses = example_losses(logits, labels, training.label_smoothing_factor) * micro_batch.weight
            # The one place that scales the loss: DDP and FSDP average gradients over processes, so that multiplying by
            # their number makes this the sum over the global batch divided by its true size, the last batch's too.
            accelerator.backward(losses.sum() * (accelerator.num_processes / len(rows)))
        loss_sum += losses.detach().sum()

    # Clipping sees the whole gradient, once. An infinite bound only measures it.
    bound = float("inf") if training.max_grad_norm is None else training.max_grad_norm
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), bound)
    optimizer.step()
    optimizer.zero_grad()
    if accelerator.optimizer_step_was_skipped:
        raise GradientOverflow
    learning_rate = scheduler.get_last_lr()[-1]
    scheduler.step()
    real = [m.indices for part in divided for m in part if m.weight]
    return StepStatistics(
        loss_sum=loss_sum,
        grad_norm=torch.as_tensor(grad_norm),
        examples=len(rows),
        tokens=int(lengths.sum()),
        positions=sum(len(indices) * int(lengths[indices].max()) for indices in real),
        padded_positions=len(rows) * int(lengths.max()),
        learning_rate=float(learning_rate),
    )


def seed_dropout(seed: int, step: int, process_index: int) -> None:
    """Seed torch for one step, so that dropout depends on where in the run it is drawn and not on what came before."""
    digest = hashlib.sha256(f"{seed} {step} {process_index}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass
class Run:
    """What `fit` works with: everything prepared, on its device."""

    accelerator: Accelerator
    inputs: Inputs
    plan: TrainingPlan
    folder: RunFolder
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    state: TrainerState
    max_tokens: int

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)


def fit(run: Run, stop: StopRequest) -> None:
    """Train to the end of the plan, logging, evaluating and saving at its moments.

    Raises:
        Interrupted: a signal came; a checkpoint was saved first.
        TrainingFailed: the loss is not finite.
    """
    state, plan, recipe = run.state, run.plan, run.inputs.recipe
    loss_sum = torch.zeros((), device=run.accelerator.device)  # this process's share since the last logged line
    progress = Progress(plan.total_steps, state.step, main_process=run.is_main)
    window_tokens, window_started = 0, time.perf_counter()
    run.model.train()
    try:
        while state.step < plan.total_steps and not state.stopped_early:
            started = time.perf_counter()
            try:
                done = training_step(
                    run.accelerator,
                    run.model,
                    run.optimizer,
                    run.scheduler,
                    run.inputs.splits["train"],
                    recipe,
                    state.step,
                    run.max_tokens,
                )
            except GradientOverflow:
                state.overflows += 1
                continue  # the same step again, with a smaller scale
            state.step += 1
            state.tokens += done.tokens
            state.positions += done.positions
            state.padded_positions += done.padded_positions
            state.examples += done.examples
            loss_sum += done.loss_sum
            window_tokens += done.tokens
            progress.step()

            logs, evaluates = plan.logs_at(state.step), plan.evaluates_at(state.step)
            stopping = stop.agreed(run.accelerator)
            saves = plan.saves_at(state.step) or (stopping and plan.save_every is not None)
            if logs or evaluates or saves or stopping:
                state.loss_sum += float(run.accelerator.reduce(loss_sum, "sum"))
                loss_sum.zero_()
                if not abs(state.loss_sum) < float("inf"):
                    raise TrainingFailed(
                        f"the loss is {state.loss_sum} at step {state.step}; a smaller training.learning_rate or a warm-up "
                        "often helps. The last checkpoint is kept"
                    )
            if logs:
                line = {
                    "step": state.step,
                    "epoch": round(plan.epoch(state.step), 6),
                    "loss": state.loss_sum / state.examples,
                    "grad_norm": float(done.grad_norm),
                    "learning_rate": done.learning_rate,
                    "tokens": state.tokens,
                }
                state.loss_sum, state.examples = 0.0, 0
                progress.log(line, window_tokens / (time.perf_counter() - window_started))
                window_tokens, window_started = 0, time.perf_counter()
                record(run, line)
            state.seconds["train"] += time.perf_counter() - started
            if evaluates:
                evaluate_during_training(run)
                saves = saves or (state.stopped_early and plan.save_every is not None)
            if saves:
                save(run)
            if stopping:
                raise Interrupted(
                    f"interrupted after step {state.step} of {plan.total_steps}; "
                    + ("continue with --resume" if saves else "nothing was saved, because saving.save_strategy is no")
                )
            if evaluates or saves:
                window_tokens, window_started = 0, time.perf_counter()
    finally:
        progress.close()


def record(run: Run, line: dict[str, Any]) -> None:
    """Write a line to metrics.jsonl and to the trackers."""
    if run.is_main:
        run.folder.append_metrics(line)
    prefix = f"{line['split']}/" if "split" in line else "train/"
    values = {prefix + name: value for name, value in line.items() if name not in ("step", "split")}
    run.accelerator.log(values, step=line["step"])


def evaluate_during_training(run: Run) -> None:
    """Evaluate the validation split, keep the weights if they are the best so far, and see whether to stop early."""
    started = time.perf_counter()
    state, settings = run.state, run.inputs.recipe.evaluation
    split = run.inputs.splits["validation"]
    scores = score(run, split, predict_logits(run.accelerator, run.model, split.tokens, run.max_tokens))
    record(run, {"step": state.step, "split": "validation", **scores})
    shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
    value = scores[settings.best_metric]
    threshold = settings.early_stopping_threshold if settings.early_stopping_patience is not None else 0.0
    waits_on = metrics.improved(value, state.best_metric, settings.best_is_greater, threshold)
    if metrics.improved(value, state.best_metric, settings.best_is_greater):
        state.best_metric, state.best_step = value, state.step
        shown += "  (best so far)"
        write_model(run, run.folder.best, {"validation": scores})
    state.evaluations_since_best = 0 if waits_on else state.evaluations_since_best + 1
    patience = settings.early_stopping_patience
    state.stopped_early = patience is not None and state.evaluations_since_best >= patience
    logger.info("step %d  validation  %s", state.step, shown)
    if state.stopped_early:
        logger.info("stopping early: no better %s in %d evaluations", settings.best_metric, patience)
    state.seconds["evaluate"] += time.perf_counter() - started


def score(run: Run, split: Split, logits: Logits) -> dict[str, float]:
    """The recipe's metrics and the plain loss of a labelled split; the same on every process."""
    return metrics.compute_metrics(
        run.inputs.metrics, logits, split.rows.labels, average=run.inputs.recipe.evaluation.average
    )


def write_model(run: Run, folder: Path, scores: dict[str, dict[str, float]]) -> None:
    """Write the current weights as a folder that transformers loads. Collective: every process must call it."""
    weights = run.accelerator.get_state_dict(run.model)
    if run.is_main:
        card = artifacts.model_card(run.inputs.recipe, run.inputs.label_names, run.state.step, scores)
        artifacts.save_model(folder, run.inputs.model, weights, run.inputs.tokenizer, card)


def save(run: Run) -> None:
    """Write a checkpoint and delete the oldest. Collective: every process must call it."""
    started = time.perf_counter()
    weights = run.accelerator.get_state_dict(run.model)
    tensors, values = state_by_name(_inner(run.optimizer), run.inputs.model)
    if run.is_main:
        scaler = run.accelerator.scaler
        checkpoint.save_checkpoint(
            run.folder.checkpoints,
            run.state.step,
            weights,
            tensors,
            {
                "state": asdict(run.state),
                "scheduler": _plain(run.scheduler.state_dict()),
                "optimizer_values": values,
                "scaler": None if scaler is None else scaler.state_dict(),
                "mathematics": mathematics(run.inputs),
                "num_processes": run.accelerator.num_processes,
                "max_tokens_per_device": run.max_tokens,
            },
        )
        checkpoint.rotate(run.folder.checkpoints, run.inputs.recipe.saving.save_total_limit)
        run.folder.set_status("running", run.state.step)
    run.accelerator.wait_for_everyone()
    run.state.seconds["save"] += time.perf_counter() - started


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if isinstance(value, int | float | list | str | bool | None)}


def _inner(optimizer: Optimizer) -> Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def restore(run: Run, path: Path, allow_changed: Sequence[str]) -> None:
    """Continue from a checkpoint: weights, optimizer, schedule, scaler and state are those of the saved step.

    Raises:
        RunFolderError: the checkpoint is damaged, or belongs to other mathematics than the recipe's.
    """
    weights, tensors, saved = checkpoint.load_checkpoint(path)
    changed = [
        (key, before, now)
        for key, before, now in differences(saved["mathematics"], mathematics(run.inputs))
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in allow_changed)
    ]
    if changed:
        listed = "\n".join(f"  {key}: {before!r} in the checkpoint, {now!r} now" for key, before, now in changed)
        raise RunFolderError(
            f"{path} was trained on other mathematics:\n{listed}\n"
            "Restore these values, start afresh in another --output_dir, or name each with --allow_changed KEY"
        )
    run.inputs.model.load_state_dict(weights)
    load_state_by_name(_inner(run.optimizer), run.inputs.model, tensors, saved["optimizer_values"])
    run.scheduler.load_state_dict({**run.scheduler.state_dict(), **saved["scheduler"]})
    for group, rate in zip(_inner(run.optimizer).param_groups, run.scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    if run.accelerator.scaler is not None and saved["scaler"] is not None:
        run.accelerator.scaler.load_state_dict(saved["scaler"])
    run.state = TrainerState(**saved["state"])


def mathematics(inputs: Inputs) -> dict[str, Any]:
    """All that the steps of a run are a function of, as JSON; where the data lie and what is logged is left out."""
    recipe = inputs.recipe.model_dump(mode="json")
    for key in ("path", "name", "revision", "data_files", "encoding", "sha256"):
        del recipe["dataset"][key]  # what was read is compared, by its hash
    for key in ("checkpoint", "revision", "tokenizer"):
        del recipe["model"][key]
    return {
        **{section: recipe[section] for section in ("dataset", "model", "training", "evaluation")},
        "data": {role: split.rows.sha256 for role, split in inputs.splits.items()},
        "labels": inputs.label_names,
        "tokenizer": tokenizer_sha256(inputs.tokenizer),
    }


def differences(before: Any, now: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values differ between two nested dictionaries, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            entry
            for name in sorted({*before, *now})
            for entry in differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if before == now else [(key, before, now)]


def read_inputs(recipe: Recipe, options: Options) -> Inputs:
    """Read and check the data, the tokenizer, the model and the metrics.

    Raises:
        UserError: any of them is not as the recipe says.
    """
    loaded = metrics.load_metrics(recipe.evaluation.metrics, allow_remote_code=options.trust_remote_code)
    data = load_labelled(recipe.dataset)
    remote = {"trust_remote_code": options.trust_remote_code}
    training_texts = (
        text for texts, pairs in data.roles["train"].texts(recipe.dataset) for text in [*texts, *(pairs or [])]
    )
    tokenizer = load_tokenizer(recipe.model, training_texts, **remote)
    config = load_config(recipe.model, data.label_names, tokenizer, **remote)
    max_length = longest_input(recipe.dataset.max_length, tokenizer, config)
    tokenizer.model_max_length = max_length  # travels with the model, so that pipelines cut where training did
    splits = {role: tokenise(rows, recipe.dataset, tokenizer, max_length) for role, rows in data.roles.items()}
    model = build_model(recipe.model, config, recipe.training.seed, **remote)
    return Inputs(
        recipe=pinned(recipe, data, max_length, config),
        splits=splits,
        label_names=data.label_names,
        tokenizer=tokenizer,
        model=model,
        initial_sha256=weights_sha256(model.state_dict()),
        metrics=loaded,
        notes=[*data.notes, *truncation_notes(splits, max_length)],
    )


def truncation_notes(splits: dict[str, Split], max_length: int) -> list[str]:
    """One line per split that was cut to the maximum length."""
    return [
        f"{role}: {split.tokens.truncated} of {len(split)} rows ({split.tokens.truncated / len(split):.1%}) are longer than "
        f"{max_length} tokens and were cut"
        for role, split in splits.items()
        if split.tokens.truncated
    ]


def pinned(recipe: Recipe, data: LabelledData, max_length: int, config: Any) -> Recipe:
    """The recipe with everything in it that could mean something else tomorrow fixed: commits, rows, length, labels."""
    dataset = recipe.dataset.model_copy(
        update={
            "revision": data.revision or recipe.dataset.revision,
            "max_length": max_length,
            "labels": recipe.dataset.labels or data.label_names,
            "sha256": {role: rows.sha256 for role, rows in data.roles.items()},
        }
    )
    commit = getattr(config, "_commit_hash", None)
    model = recipe.model.model_copy(update={"revision": commit or recipe.model.revision})
    return recipe.model_copy(update={"dataset": dataset, "model": model})


def on_every_process(accelerator: Accelerator, recipe: Recipe, options: Options) -> Inputs:
    """`read_inputs`, by the first process of each machine before the others, so that the caches are written once.

    Raises:
        UserError: on every process, if it showed on any; or the processes made different initial weights.
    """
    inputs, error = None, None
    if not accelerator.is_local_main_process:
        accelerator.wait_for_everyone()
    try:
        inputs = read_inputs(recipe, options)
    except UserError as mistake:
        error = mistake
    if accelerator.is_local_main_process:
        accelerator.wait_for_everyone()
    hardware.raise_together(accelerator, error)
    assert inputs is not None
    hashes = gather_object([inputs.initial_sha256])
    if len(set(hashes)) > 1:
        raise UserError(
            f"the processes made different initial weights ({', '.join(h[:12] for h in hashes)}); "
            "give every machine the same checkpoint and the same versions of torch and transformers"
        )
    return inputs


def train(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Train, evaluate and save what a recipe says.

    Returns:
        the contents of results.json.

    Raises:
        UserError: a mistake of the user's, in recipe, data, launch or output folder.
        Interrupted: a signal came; a checkpoint was saved first.
        TrainingFailed: training cannot go on.
    """
    accelerator = hardware.start_accelerator(recipe.tracking.report_to, options.output_dir)
    speak_on(accelerator.is_main_process)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    resume = options.resume or options.resume_from_checkpoint is not None
    folder, error = RunFolder(options.output_dir), None
    if accelerator.is_main_process:
        try:
            open_run_folder(options.output_dir, resume=resume)
            checkpoint.restore_interrupted(folder.best)
            checkpoint.restore_interrupted(folder.model)
            folder.set_status("running", folder.status().get("step") or 0)
        except UserError as mistake:
            error = mistake
    hardware.raise_together(accelerator, error)
    with Watch(folder, accelerator.is_main_process) as watch:
        inputs = on_every_process(accelerator, recipe, options)
        for note in inputs.notes:
            logger.info("note: %s", note)
        run = prepare(accelerator, inputs, folder, options)
        watch.run = run
        if resume:
            continue_run(run, options)
        write_run_json(run)
        stop = StopRequest()
        try:
            fit(run, stop)
        finally:
            stop.restore()
        results = finish(run)
        accelerator.end_training()
        return results


class Watch:
    """Keeps status.json true, however a run ends."""

    def __init__(self, folder: RunFolder, is_main: bool) -> None:
        self._folder, self._is_main = folder, is_main
        self.run: Run | None = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not self._is_main:
            return
        step = 0 if self.run is None else self.run.state.step
        if error is None:
            self._folder.set_status("done", step, EXIT_DONE)
        elif isinstance(error, Interrupted):
            self._folder.set_status("interrupted", step, error.exit_code, str(error))
        else:
            code = error.exit_code if isinstance(error, AccelTrainerError) else EXIT_FAILED
            self._folder.set_status("failed", step, code, f"{type(error).__name__}: {error}")


def prepare(accelerator: Accelerator, inputs: Inputs, folder: RunFolder, options: Options) -> Run:
    """Put model and optimizer on their device, wrapped as the accelerate config says, and open the trackers."""
    recipe = inputs.recipe
    plan = TrainingPlan.of(recipe, len(inputs.splits["train"]))
    if options.gradient_checkpointing:
        inputs.model.gradient_checkpointing_enable({"use_reentrant": False})
    groups = parameter_groups(inputs.model, recipe.training)
    optimizer = build_optimizer(groups, recipe.training, accelerator.device)
    # The schedule stays unprepared: Accelerate's wrapper would move it once per process and update.
    scheduler = build_scheduler(optimizer, recipe.training, plan)
    model, prepared = accelerator.prepare(inputs.model, optimizer)
    if recipe.tracking.report_to:
        flat = {key: str(value) for key, _, value in differences({}, recipe.model_dump(mode="json"))}
        accelerator.init_trackers(recipe.tracking.project_name, config=flat)
    return Run(
        accelerator=accelerator,
        inputs=inputs,
        plan=plan,
        folder=folder,
        model=model,
        optimizer=prepared,
        scheduler=scheduler,
        state=TrainerState(),
        max_tokens=hardware.tokens_per_device(accelerator, options.max_tokens_per_device),
    )


def continue_run(run: Run, options: Options) -> None:
    """Restore the checkpoint that the command line names, or the newest sound one; start afresh if there is none."""
    path, complaints = options.resume_from_checkpoint, list[str]()
    if path is None:
        path, complaints = checkpoint.newest_sound(run.folder.checkpoints)
    for complaint in complaints:
        logger.warning("%s", complaint)
    if path is None:
        logger.info("no checkpoint in %s: starting from the beginning", run.folder.path)
    else:
        restore(run, path, options.allow_changed)
        logger.info("continuing from %s, step %d of %d", path, run.state.step, run.plan.total_steps)
    if run.is_main:
        run.folder.cut_metrics(run.state.step)
    run.accelerator.wait_for_everyone()


def write_run_json(run: Run) -> None:
    """Write recipe.yaml and run.json: what is about to be done, on what, and with which versions."""
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
            "hardware": facts,
            "max_tokens_per_device": run.max_tokens,
            "versions": hardware.versions(),
            "git_commit": hardware.git_commit(Path.cwd()),
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
            "notes": inputs.notes,
        },
    )
    logger.info(
        "%d examples, %d steps of %d (%d an epoch), %s of %s parameters trained; %d process%s on %s, precision %s",
        plan.num_examples,
        plan.total_steps,
        plan.global_batch_size,
        plan.steps_per_epoch,
        f"{counts['trainable']:,}",
        f"{counts['total']:,}",
        facts["num_processes"],
        "" if facts["num_processes"] == 1 else "es",
        facts["device"],
        "float32" if facts["mixed_precision"] == "no" else facts["mixed_precision"],
    )


def finish(run: Run) -> dict[str, Any]:
    """Take the best weights if the recipe says so, score every split, and write what the run leaves.

    Returns:
        the contents of results.json.
    """
    inputs, state, recipe = run.inputs, run.state, run.inputs.recipe
    if recipe.saving.load_best_model_at_end and state.best_step is not None:
        reason = checkpoint.damage(run.folder.best)
        if reason is not None:
            raise RunFolderError(
                f"{run.folder.best}: {reason}; the last checkpoint is sound, remove best/ and train again"
            )
        inputs.model.load_state_dict(load_file(run.folder.best / "model.safetensors"))
    results: dict[str, Any] = {"train": throughput(run)}
    scores: dict[str, dict[str, float]] = {}
    for role in ("validation", "test"):
        if role not in inputs.splits:
            continue
        split = inputs.splits[role]
        logits = predict_logits(run.accelerator, run.model, split.tokens, run.max_tokens)
        if split.rows.is_labelled:
            scores[role] = score(run, split, logits)
            details = metrics.detailed_report(logits, split.rows.labels, inputs.label_names)
            results[role] = {**scores[role], **details}
            if run.is_main:
                print(f"\n{role}\n{metrics.classification_report(details)}")
        if run.is_main:
            run.folder.write_predictions(
                role, artifacts.prediction_rows(split, recipe.dataset, logits, inputs.label_names)
            )
    write_model(run, run.folder.model, scores)
    if run.is_main:
        write_json(run.folder.results, results)
        print_scores(scores, run.folder.path)
    return results


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


def print_scores(scores: dict[str, dict[str, float]], path: Path) -> None:
    """A table of the scores on the terminal, and where the run lies."""
    names = list(dict.fromkeys(name for values in scores.values() for name in values))
    if names:
        width = max(10, *map(len, names))
        print("\n" + " " * 12 + "".join(f"{name:>{width + 2}}" for name in names))
        for role, values in scores.items():
            print(f"{role:<12}" + "".join(f"{values[name]:>{width + 2}.4f}" for name in names))
    print(f"\nrun: {path}\nmodel: {path / 'model'}", flush=True)


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line; what looks like `section.key=value` is an override."""
    parser = argparse.ArgumentParser(
        prog="accel_trainer.train",
        description="Train a text classifier from a recipe.",
        epilog="accelerate launch --config_file accelerate_configs/cpu.yaml -m accel_trainer.train recipes/quickstart.yaml",
    )
    parser.add_argument("recipe", help="path of a recipe, or its name in the library, such as imdb/distilbert")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    parser.add_argument("--output_dir", type=Path, help="folder of the run (default: runs/ and the recipe's name)")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint, or start if there is none"
    )
    parser.add_argument("--resume_from_checkpoint", type=Path, metavar="PATH", help="continue from this checkpoint")
    parser.add_argument(
        "--allow_changed", action="append", default=[], metavar="KEY", help="continue although this key has changed"
    )
    parser.add_argument(
        "--max_tokens_per_device", type=positive, metavar="N", help="tokens per micro-batch, padding included"
    )
    parser.add_argument("--gradient_checkpointing", action="store_true", help="less memory, a third more time")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run code that the checkpoint's repository holds"
    )
    arguments = parser.parse_intermixed_args(argv)
    return arguments, arguments.overrides


def positive(text: str) -> int:
    """A positive integer from the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trainer from a command line.

    Returns:
        the exit code: 0 done, 2 the user's mistake, 75 interrupted after saving, 1 anything else.
    """
    arguments, overrides = parse_arguments(argv)
    # Every process meets the same mistakes in the recipe; one of them says so.
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        name, path = find_recipe(arguments.recipe)
        options = Options(
            output_dir=(arguments.output_dir or Path("runs") / name).absolute(),
            resume=arguments.resume,
            resume_from_checkpoint=arguments.resume_from_checkpoint,
            allow_changed=tuple(arguments.allow_changed),
            max_tokens_per_device=arguments.max_tokens_per_device,
            gradient_checkpointing=arguments.gradient_checkpointing,
            trust_remote_code=arguments.trust_remote_code,
        )
        train(load_recipe(path, overrides), options)
    except AccelTrainerError as error:
        if is_first:
            print(f"{'' if isinstance(error, Interrupted) else 'error: '}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())

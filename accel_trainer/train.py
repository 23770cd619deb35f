"""Train a text classifier from a recipe.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m accel_trainer.train recipes/quickstart.yaml

The way through this file is `main → train → fit → training_step`. The recipe fixes the mathematics: which examples each
optimizer step uses, what they are divided by, what dropout drops, when the schedule moves. The accelerate config fixes
the hardware. How a global batch is cut into micro-batches is decided here, and changes nothing but rounding.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from accel_trainer import collectives, device_memory, hardware, metrics, rehearsal, xla
from accel_trainer.callable_module import make_callable
from accel_trainer.device_memory import out_of_memory_named
from accel_trainer.endings import ended_together, fail_not_finite, halve_token_budget, stopped
from accel_trainer.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    AccelTrainerError,
    Interrupted,
    OutOfMemory,
    ProcessLost,
    TrainingFailed,
    UserError,
)
from accel_trainer.feed import LoadedMicroBatch
from accel_trainer.finishing import finish, show
from accel_trainer.loss import Tally, example_losses
from accel_trainer.opening import prepared_run
from accel_trainer.optim import clip_gradients
from accel_trainer.origin import Origin, origin_of
from accel_trainer.recipe import Recipe
from accel_trainer.recipe_file import load_recipe
from accel_trainer.redaction import without_secrets
from accel_trainer.resuming import continue_run
from accel_trainer.run import Run, StepStatistics, record, save, write_best
from accel_trainer.run_folder import RunFolder, opened
from accel_trainer.scoring import logits_of, score
from accel_trainer.sharding import is_sharded
from accel_trainer.signals import StopRequest, ignore_stop_signals, interrupted_by_signals
from accel_trainer.terminal import complain, write_any_text
from accel_trainer.tracking import Progress, logger, speak_on
from accel_trainer.train_options import Options, parse_arguments

SLOWER = "A smaller training.learning_rate, a warm-up or training.max_grad_norm often helps."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trainer from a command line.

    Returns:
        the exit code: 0 done, 2 the user's mistake, 75 interrupted, 1 anything else.
    """
    arguments = parse_arguments(argv)
    # Every process meets the same mistakes; one of them says so.
    is_first = collectives.is_first_process()
    write_any_text()
    speak_on(is_first)
    options = {name: value for name, value in vars(arguments).items() if name not in ("recipe", "overrides")}
    try:
        with interrupted_by_signals():
            with hardware.told_to_other_machines(arguments.ddp_timeout):
                origin = origin_of(arguments.recipe, arguments.overrides)
            train_recipe(origin, **options)
    except AccelTrainerError as error:
        is_told = isinstance(error, UserError) and error.is_told
        is_own = isinstance(error, OutOfMemory | ProcessLost)  # which not every process knows of
        if (is_first and not is_told) or is_own:
            complain(error)
        return xla.end_function(error.exit_code)
    except Exception:
        print(without_secrets(traceback.format_exc()), file=sys.stderr, flush=True)
        return xla.end_function(EXIT_FAILED)
    return EXIT_DONE


def train_recipe(origin: Origin, output_dir: Path | None = None, **options: Any) -> dict[str, Any]:
    """`train` for a recipe that stands in a file. A user's mistake is noted in the run's status.json too.

    Args:
        origin: of the recipe.
        output_dir: folder of the run; None: runs/ and the recipe's name.
        options: others of `Options`.
    """
    chosen = Options((output_dir or Path("runs") / origin.name).expanduser().absolute(), **options)
    try:
        with hardware.told_to_other_machines(chosen.ddp_timeout):
            recipe = load_recipe(origin.path, origin.overrides)
        return train(recipe, chosen, origin)
    except UserError as error:
        if collectives.is_first_process() and not chosen.dry_run:
            RunFolder(chosen.output_dir).note_mistake(error, resume=chosen.resumes)
        raise


def train(recipe: Recipe, options: Options, origin: Origin | None = None) -> dict[str, Any]:
    """Train, evaluate and save what a recipe says; or only try whether that works, with `options.dry_run`.

    Args:
        recipe: resolved.
        options: of the launch.
        origin: where the recipe stands, for run.json.

    Returns:
        the contents of results.json.

    Raises:
        UserError: a mistake of the user's, in recipe, data, launch or output folder.
        Interrupted: a signal came, or the step to stop after. If steps had been taken a checkpoint was saved first, unless
            a second Ctrl-C did not want to wait for it.
        TrainingFailed: training cannot go on.
    """
    if options.dry_run:
        return rehearse(recipe, options)
    folder = RunFolder(options.output_dir)
    with prepared_run(recipe, options, folder, opened(folder, resume=options.resumes), origin) as run:
        with ended_together(run) as stop:
            fit(run, stop, options.stop_after)
            if run.state.step == options.stop_after:
                raise stopped(run)
            results = finish(run, stop)
        show(run, results)
    return results


def rehearse(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Take the steps of a rehearsal, go back to its first checkpoint, go on from there, finish, and say how it went.

    Raises:
        UserError, Interrupted, TrainingFailed: as `train`; nothing is left in any case.
    """
    folder = rehearsal.folder_beside(options.output_dir)
    with prepared_run(
        recipe, options, folder, rehearsal.leaving_nothing(folder), shorten=rehearsal.shortened_inputs
    ) as run:
        with ended_together(run) as stop:
            fit(run, stop, rehearsal.STEPS)
            first_time = rehearsal.losses(folder) if run.is_main else []
            continue_run(run, folder.checkpoints / "checkpoint-1", (), keep_token_budget=True)
            fit(run, stop)
            results = finish(run, stop)
        if run.is_main:
            peak = device_memory.peak_memory(run.accelerator.device)
            rehearsal.show(results, first_time, rehearsal.losses(folder), peak)
    return results


def fit(run: Run, stop: StopRequest, until: int | None = None) -> None:
    """Train to the end of the plan, logging, evaluating and saving at its moments; or to a step, and save there.

    Raises:
        Interrupted: a signal came; a checkpoint was saved first.
        TrainingFailed: loss or gradient are not finite.
    """
    state, plan = run.state, run.plan
    tally = Tally(run.accelerator)
    progress = Progress(plan.total_steps, state.step, main_process=run.is_main)
    run.model.train()
    try:
        if plan.evaluates_at(state.step) and state.evaluated_step < state.step:  # the run was stopped before or in it
            evaluate_and_save(run, stop)
            progress.resume()
        while state.step < plan.total_steps and not state.stopped_early:
            started = time.perf_counter()
            try:
                done = training_step(run, state.step)
            except GradientOverflow:
                state.overflows += 1
                continue  # the same step again, with a smaller scale
            except OutOfMemory as error:
                halve_token_budget(run, error)
                clear_gradients(run)
                continue  # the same step again, in smaller micro-batches
            except NotFinite as error:
                fail_not_finite(run, state.step + 1, remedy=str(error))
            state.add(done)
            tally.add(state.step, done.loss_sum, done.grad_norm)
            xla.end_graph(run.accelerator.device)

            asked = stop.agreed(run.accelerator, now=state.step == plan.total_steps)
            ends_here = state.step == until
            logs = plan.logs_at(state.step)
            if logs or plan.evaluates_at(state.step) or plan.saves_at(state.step) or ends_here or asked:
                loss_sum, not_finite = tally.read()
                if not_finite is not None:
                    fail_not_finite(run, not_finite, remedy=SLOWER)
                state.loss_sum += loss_sum
            progress.step(done.work.tokens)
            state.seconds["train"] += time.perf_counter() - started
            if logs:
                log(run, done, progress)
            evaluate_and_save(run, stop, asked=asked, ends_here=ends_here)
            if ends_here:
                return
            progress.resume()
    finally:
        progress.close()


def evaluate_and_save(run: Run, stop: StopRequest, *, asked: bool = False, ends_here: bool = False) -> None:
    """Do what is due after the step that the run is at.

    Args:
        run: at the end of a step.
        stop: asked again during and after what takes long.
        asked: someone wants the run to stop: an evaluation is left to the run that goes on from here.
        ends_here: no further step is taken for now.

    Raises:
        Interrupted: someone wants the run to stop; a checkpoint was saved first.
    """
    state, plan = run.state, run.plan
    if plan.evaluates_at(state.step) and not asked:
        try:
            evaluate_during_training(run, stop)
            asked = stop.agreed(run.accelerator, now=True)
        except Interrupted:
            asked = True
    if plan.saves_at(state.step) or state.stopped_early or ends_here or asked:
        save(run)
        asked = asked or stop.agreed(run.accelerator, now=True)
    if asked:
        raise stopped(run)


def training_step(run: Run, step: int) -> StepStatistics:
    """Perform optimizer step `step` (counted from 0): one global batch, one update, one move of the schedule.

    Raises:
        OutOfMemory: a micro-batch does not fit; nothing was updated, but gradients are left over.
        GradientOverflow: fp16 gradients overflowed; nothing was updated and the scale is smaller now.
        NotFinite: the gradient is no number, and this device tells so at once, or it overflows at any scale; nothing was
            updated.
    """
    work = run.feed.take(step, run.max_tokens)
    loss_sum = add_gradients(run, work.micro_batches, work.examples)
    learning_rate = run.scheduler.get_last_lr()[-1]
    grad_norm = apply_gradients(run)
    return StepStatistics(loss_sum, grad_norm, float(learning_rate), work)


def add_gradients(run: Run, micro_batches: Sequence[LoadedMicroBatch], global_batch_size: int) -> torch.Tensor:
    """Add up one process's share of the gradient of a global batch.

    Args:
        run: its gradients are added to.
        micro_batches: this process's share of the step.
        global_batch_size: examples of this step over all processes; fewer in the last batch of an epoch.

    Returns:
        the plain sum of this share's example losses, a scalar.

    Raises:
        OutOfMemory: they do not fit; some of them may have been added.
    """
    accelerator, smoothing = run.accelerator, run.inputs.recipe.training.label_smoothing_factor
    loss_sum = torch.zeros((), device=accelerator.device)
    xla.end_graph(accelerator.device)
    for i, loaded in enumerate(micro_batches):
        is_last = i == len(micro_batches) - 1
        named = out_of_memory_named(len(loaded.labels), loaded.batch.num_positions)
        # In shares each gradient goes to those who hold them at once: put off, all of it would lie whole on every process.
        with named, nullcontext() if is_last or is_sharded(run.model) else accelerator.no_sync(run.model):
            here = loaded.on(accelerator.device)
            logits = run.model(here.batch.inputs, here.example_keys, here.batch.packing)
            losses = example_losses(logits, here.labels, smoothing) * here.weights
            # The one place that scales the loss: DDP and FSDP average gradients over processes, so that multiplying by
            # their number makes this the sum over the global batch divided by its true size, the last batch's too.
            accelerator.backward(losses.sum() * (accelerator.num_processes / global_batch_size))
            loss_sum = loss_sum + losses.detach().sum()
            xla.end_graph(accelerator.device)  # where a full memory shows
    return loss_sum


def apply_gradients(run: Run) -> torch.Tensor:
    """Clip, update the weights, move the schedule: each once per step, whatever the gradient was added up from.

    Returns:
        the norm of the gradient before clipping, a scalar.

    Raises:
        GradientOverflow: fp16 gradients overflowed; nothing was updated and the scale is smaller now.
        NotFinite: the gradient is no number, and this device tells so at once, or it overflows at any scale; nothing was
            updated.
    """
    accelerator = run.accelerator
    try:
        with out_of_memory_named():
            grad_norm = clip_gradients(accelerator, run.model, run.inputs.recipe.training.max_grad_norm)
            # Other devices would have to be waited for; there, `fit` sees it when it reads the losses. Gradients are the
            # same on all processes by now, so that all of them see it.
            if accelerator.device.type == "cpu" and accelerator.scaler is None and not math.isfinite(grad_norm):
                raise NotFinite(SLOWER)
            update(run)
            xla.end_graph(accelerator.device)
    except OutOfMemory as error:  # not repeated: some weights may have moved, and no micro-batch is too large
        raise TrainingFailed(
            f"{error}: the optimizer's state does not fit; use a smaller checkpoint or a larger device. "
            "The last checkpoint is kept"
        ) from error
    run.scheduler.step()
    return grad_norm


class GradientOverflow(Exception):
    """fp16 gradients were too large for the scale; the update was skipped."""


class NotFinite(Exception):
    """The gradient is not a number; there was no update. Its text is what often helps."""


def update(run: Run) -> None:
    """Apply the gradient, unless it overflowed in fp16.

    Raises:
        GradientOverflow: it did; the scale is smaller now.
        NotFinite: it does at any scale.
    """
    scaler = run.accelerator.scaler
    # A fused optimizer skips inside its kernel, so that Accelerate's `optimizer_step_was_skipped` stays false: the scale
    # tells, which falls when and only when a step was skipped.
    scale = None if scaler is None else scaler.get_scale()
    run.optimizer.step()
    clear_gradients(run)
    if scaler is None or scale is None or scaler.get_scale() >= scale:
        return
    if scaler.get_scale() < 1:
        raise NotFinite(
            f"It is so in fp16 at any scale: bf16 or float32 (mixed_precision in the accelerate config) may help. {SLOWER}"
        )
    raise GradientOverflow


def clear_gradients(run: Run) -> None:
    """Begin a gradient afresh. On XLA it becomes zero instead of none: to add to none would be another graph."""
    run.optimizer.zero_grad(set_to_none=not xla.computes_on(run.accelerator.device))


def log(run: Run, done: StepStatistics, progress: Progress) -> None:
    """Show and record the steps since the last logged line."""
    state = run.state
    line = {
        "step": state.step,
        "epoch": round(run.plan.epoch(state.step), 6),
        "loss": state.loss_sum / state.examples,
        "grad_norm": float(done.grad_norm),
        "learning_rate": done.learning_rate,
        "tokens": state.tokens,
    }
    state.loss_sum, state.examples = 0.0, 0
    progress.log(line)
    record(run, line)


def evaluate_during_training(run: Run, stop: StopRequest) -> None:
    """Evaluate the validation split, keep the weights if they are the best so far, and see whether to stop early.

    Raises:
        Interrupted: a signal came; nothing is recorded.
    """
    started = time.perf_counter()
    state, settings = run.state, run.inputs.recipe.evaluation
    split = run.inputs.splits["validation"]
    scores = score(run, split, logits_of(run, split, stop))
    state.evaluated_step = state.step
    record(run, {"step": state.step, "split": "validation", **scores})
    shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
    value = scores[settings.best_metric]
    if metrics.improved(value, state.best_metric, settings.best_is_greater):
        # Patience asks for a little more than better, where a threshold is set.
        threshold = settings.early_stopping_threshold
        improved_enough = metrics.improved(value, state.best_metric, settings.best_is_greater, threshold)
        state.best_metric, state.best_step = value, state.step
        shown += "  (best so far)"
        write_best(run, scores)
    else:
        improved_enough = False
    state.evaluations_since_best = 0 if improved_enough else state.evaluations_since_best + 1
    patience = settings.early_stopping_patience
    state.stopped_early = patience is not None and state.evaluations_since_best >= patience
    logger.info("step %d  validation  %s", state.step, shown)
    if state.stopped_early:
        logger.info("stopping early: no better %s in %d evaluations", settings.best_metric, patience)
    state.seconds["evaluate"] += time.perf_counter() - started


make_callable(__name__)  # `from accel_trainer import train` is a function

if __name__ == "__main__":
    ignore_stop_signals()  # but for what listens to them
    collectives.end_process(main())

"""Going on from a checkpoint: which one, whether it is this run's, and what is made of it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from accel_trainer import checkpoint, collectives
from accel_trainer.collectives import gather_object
from accel_trainer.differences import differences, flat, in_groups
from accel_trainer.errors import RunFolderError
from accel_trainer.inputs import mathematics
from accel_trainer.optim import load_state_by_name
from accel_trainer.run import Run, TrainerState, inner_optimizer, received
from accel_trainer.run_folder import RunFolder
from accel_trainer.tracking import logger

# Entries of trainer_state.json → their types.
SAVED: dict[str, Any] = {
    "state": dict,
    "optimizer_values": dict,
    "scaler": dict | None,
    "mathematics": dict,
    "max_tokens_per_device": int,
}


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
    load_state_by_name(inner_optimizer(run.optimizer), run.inputs.model, tensors, saved["optimizer_values"])
    # Rates are a function of the step and of the recipe as it is now: what was allowed to change takes effect.
    step = saved["state"]["step"]
    rates = [base * at(step) for base, at in zip(run.scheduler.base_lrs, run.scheduler.lr_lambdas, strict=True)]
    moved = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    run.scheduler.load_state_dict({**run.scheduler.state_dict(), **moved})
    for group, rate in zip(inner_optimizer(run.optimizer).param_groups, rates, strict=True):
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

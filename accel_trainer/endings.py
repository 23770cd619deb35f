"""How a run ends before its end, and who is told."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from accelerate import Accelerator

from accel_trainer import artifacts, checkpoint, collectives, rendezvous, xla
from accel_trainer.batching import smaller_budget
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
from accel_trainer.redaction import without_secrets
from accel_trainer.run import Run, all_shapes, amend_run_json
from accel_trainer.run_folder import LAST_WORDS, RunFolder, write_json
from accel_trainer.signals import StopRequest, handling
from accel_trainer.tracking import close_trackers, logger


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
        saves = "" if xla.computes_on(run.accelerator.device) else "--gradient_checkpointing, "
        raise OutOfMemory(
            f"{error}: even single examples do not fit; shorten dataset.max_length, or use {saves}a smaller checkpoint or a larger "
            "device. The last checkpoint is kept"
        ) from error
    run.max_tokens = smaller_budget(run.max_tokens, error.tokens)
    if run.accelerator.num_processes == 1:
        logger.warning("out of memory: going on with micro-batches of %d tokens (%s)", run.max_tokens, str(error))
        if run.feed.few_shapes:
            with suppress(RunFolderError):  # a full disk is not what ends the run
                amend_run_json(run, max_tokens_per_device=run.max_tokens, shapes=all_shapes(run))
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


@contextmanager
def ended_together(run: Run) -> Iterator[StopRequest]:
    """Note requests to stop while the block lasts. At its end, or interrupted on every process, all of them leave together.

    A launcher ends the other processes as soon as one has ended.
    """
    with StopRequest() as stop:
        interrupted = None
        try:
            yield stop
        except Interrupted as error:
            interrupted = error
        with handling(signal.SIG_IGN):
            close_trackers(run.accelerator)
            run.accelerator.wait_for_everyone()
            collectives.leave_process_group(run.accelerator)
        if interrupted is not None:
            raise interrupted


def stopped(run: Run) -> Interrupted:
    """What to say of a run that ends before its end."""
    return Interrupted(f"interrupted after step {run.state.step} of {run.plan.total_steps}; continue with --resume")

"""The opening of a run: on its hardware, in its folder, with its inputs, where it left off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from uuid import uuid4

from accelerate import Accelerator

from accel_trainer import collectives, hardware
from accel_trainer.collectives import gather_object, lost_processes_named
from accel_trainer.endings import heard_by_main
from accel_trainer.errors import UserError
from accel_trainer.inputs import Inputs, check_same, read_inputs_together
from accel_trainer.origin import Origin
from accel_trainer.recipe import Recipe
from accel_trainer.resuming import continue_run
from accel_trainer.run import Run, compilations_noted, prepare, write_run_json
from accel_trainer.run_folder import RunFolder, watched
from accel_trainer.signals import interrupted_by_signals
from accel_trainer.tracking import logger, quieten_libraries, speak_on
from accel_trainer.train_options import Options


def ask_who_shares(accelerator: Accelerator, folder: RunFolder) -> bool:
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
def prepared_run(
    recipe: Recipe,
    options: Options,
    folder: RunFolder,
    opening: AbstractContextManager[None],
    origin: Origin | None = None,
    shorten: Callable[[Inputs], Inputs] = lambda inputs: inputs,
) -> Iterator[Run]:
    """A run on its hardware, ready for its next step; status.json is true whatever becomes of it in the block.

    Args:
        recipe: resolved.
        options: of the launch.
        folder: of the run.
        opening: what the main process does with the folder before anything is written there, and after everything was.
        origin: where the recipe stands.
        shorten: what is taken of the inputs.

    Raises:
        UserError, Interrupted, TrainingFailed: as `train`.
    """
    accelerator = hardware.start_accelerator(recipe.tracking.report_to, folder.path, options.ddp_timeout)
    speak_on(accelerator.is_main_process)
    quieten_libraries()
    with ExitStack() as around:
        with lost_processes_named(accelerator), collectives.together(accelerator):
            if accelerator.is_main_process:
                around.enter_context(opening)
        with lost_processes_named(accelerator):
            all_share = ask_who_shares(accelerator, folder)
            check_same(accelerator, options.agreed, "were launched differently", "type the same line on every machine")
        watch = around.enter_context(watched(folder, accelerator.is_main_process))
        if not all_share:
            around.enter_context(heard_by_main(accelerator, folder))
        around.enter_context(interrupted_by_signals())
        around.enter_context(lost_processes_named(accelerator))
        inputs = read_inputs_together(accelerator, recipe, trust_remote_code=options.trust_remote_code)
        for note in inputs.notes:
            logger.info("note: %s", note)
        run = prepare(
            accelerator,
            shorten(inputs),
            folder,
            layout=options.layout,
            max_tokens_per_device=options.max_tokens_per_device,
            gradient_checkpointing=options.gradient_checkpointing,
        )
        if options.resumes:
            continue_run(
                run,
                options.resume_from_checkpoint,
                options.allow_changed,
                keep_token_budget=options.max_tokens_per_device is None,
            )
        if options.stop_after is not None and options.stop_after <= run.state.step:
            raise UserError(
                f"--stop_after {options.stop_after}: the run is at step {run.state.step}; give a later step"
            )
        write_run_json(run, origin)
        watch.steps_done = lambda: run.state.step
        around.enter_context(compilations_noted(run))
        yield run

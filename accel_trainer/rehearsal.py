"""A rehearsal (`--dry_run`): two steps of a run on its own hardware, with an evaluation, a save and a resume, on a slice.

The slice holds the longest rows, so that what does not fit into memory shows now and not after an hour.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from accel_trainer.data import Split
from accel_trainer.errors import RunFolderError
from accel_trainer.inputs import Inputs
from accel_trainer.recipe import Recipe
from accel_trainer.run_folder import RunFolder
from accel_trainer.terminal import gib, print_table, say
from accel_trainer.writing import remove

STEPS = 2  # one to save after, and one to take again after resuming
FEWEST = 64  # rows of a slice, where there are as many
ROUNDING = 1e-3  # relative difference between two losses of one step, more than half precision makes (assumption)


def folder_beside(output_dir: Path) -> RunFolder:
    """Where a rehearsal writes: on the same disk as the run would."""
    return RunFolder(output_dir.with_name(f"{output_dir.name}.dry_run"))


@contextmanager
def leaving_nothing(folder: RunFolder) -> Iterator[None]:
    """Empty the folder of what a killed rehearsal left, keep others out while the block lasts, then remove it.

    Raises:
        RunFolderError: another rehearsal is at work there, or the folder holds something else.
    """
    made = [above for above in folder.path.parents if not above.exists()]
    mark = folder.path / ".dry_run"
    with folder.locked():
        found = [path for path in folder.path.iterdir() if path.name != ".lock"]
        if found and mark not in found:
            raise RunFolderError(
                f"--dry_run needs the folder {folder.path}, which holds something else; move that away"
            )
        mark.touch()
        for path in found:
            if path != mark:
                remove(path)
        try:
            yield
        finally:
            shutil.rmtree(folder.path, ignore_errors=True)
            for above in made:
                with suppress(OSError):  # something else is there by now
                    above.rmdir()


def shortened_inputs(inputs: Inputs) -> Inputs:
    """The same inputs, shortened to slices and to steps that are each logged and saved, the last evaluated."""
    size = max(STEPS * inputs.recipe.training.global_batch_size, FEWEST)
    splits = {role: longest_rows(split, size) for role, split in inputs.splits.items()}
    return replace(inputs, recipe=shortened(inputs.recipe), splits=splits)


def shortened(recipe: Recipe) -> Recipe:
    """The recipe with its mathematics of a step as they are, for `STEPS` steps, without trackers."""
    changes: dict[str, dict[str, Any]] = {
        "training": {"max_steps": STEPS, "warmup_steps": min(recipe.training.warmup_steps, STEPS)},
        "evaluation": {"early_stopping_patience": None},
        "saving": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None},
        "tracking": {"logging_steps": 1, "report_to": []},
    }
    if recipe.evaluates:
        changes["evaluation"] |= {"eval_strategy": "steps", "eval_steps": STEPS}
    return recipe.model_copy(
        update={section: getattr(recipe, section).model_copy(update=new) for section, new in changes.items()}
    )


def longest_rows(split: Split, size: int) -> Split:
    """A split of the longest rows of another, in their order there."""
    chosen = split.tokens.lengths.argsort(kind="stable")[-size:]
    chosen.sort()
    rows, tokens = split.rows, split.tokens
    return Split(
        rows=replace(
            rows,
            table=rows.table.select(chosen),
            labels=rows.labels[chosen],
            place=lambda row: rows.place(int(chosen[row])),
        ),
        tokens=replace(
            tokens,
            columns={name: [list(column[int(row)]) for row in chosen] for name, column in tokens.columns.items()},
            lengths=tokens.lengths[chosen],
        ),
    )


def losses(folder: RunFolder) -> list[float]:
    """The losses of the steps that metrics.jsonl holds."""
    lines = map(json.loads, folder.metrics.read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "split" not in line]


def show(results: dict[str, Any], first_time: list[float], again: list[float], peak_memory: int) -> None:
    """Print how a rehearsal went.

    Args:
        results: of its end, with the seconds that went into each part.
        first_time: losses of its steps.
        again: the same, the last one taken again from the checkpoint before it.
        peak_memory: bytes.
    """
    train = results["train"]
    apart = abs(again[-1] / first_time[-1] - 1)
    rows = [
        (
            "a step",
            f"{train['train_runtime'] / train['steps']:.2f} s",
            f"{train['tokens'] / train['steps']:,.0f} tokens",
        ),
        ("an evaluation", f"{train['evaluation_runtime']:.2f} s", "of the longest rows"),
        ("a checkpoint", f"{train['saving_runtime'] / train['steps']:.2f} s", ""),
        ("peak memory", gib(peak_memory), "of this process, Python and the libraries included, on the longest rows"),
        ("after resuming", f"{apart:.0e}", "relative difference of the loss of the same step"),
    ]
    print()
    print_table(("dry run", "", ""), rows, numbers=[1])
    if apart > ROUNDING:
        say("resuming does not repeat the step: run accel-trainer prove, and report this", "yellow")
    say("\nall of it works: training, evaluation, saving, resuming, writing the model; nothing is left of it", "green")

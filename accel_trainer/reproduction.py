"""A recipe trained again and compared with the result that it records: `accel-trainer reproduce RECIPE`.

The trainer is started through `accelerate launch`, as a user would. Its run is kept and can be gone on from, like any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from accel_trainer.accelerate_config import of_launch
from accel_trainer.differences import differences
from accel_trainer.errors import EXIT_DONE, EXIT_USER_MISTAKE, Interrupted, RunFolderError, TrainingFailed, UserError
from accel_trainer.launching import LAUNCHER, TRAINER, launched
from accel_trainer.library import find_recipe
from accel_trainer.recipe import Recipe, Result
from accel_trainer.recipe_file import as_written, load_recipe
from accel_trainer.recording import WHERE, computed, result_of, taking
from accel_trainer.results import check_tolerance, newest, rounded
from accel_trainer.run_folder import RunFolder, opened, write_json
from accel_trainer.signals import interrupted_by_signals
from accel_trainer.terminal import Style, print_table, say

GRACE = 120.0  # seconds that an interrupted trainer may take to save


@dataclass(frozen=True)
class Comparison:
    """A recorded number and what has become of it."""

    metric: str  # with its role: `test accuracy`
    recorded: float
    now: float | None  # None where the new run has no such number
    tolerance: float

    @property
    def difference(self) -> float:
        """How far the numbers are apart, in the digits that are recorded; infinite where there is only one."""
        return math.inf if self.now is None else rounded(abs(self.now - self.recorded))

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.difference <= self.tolerance

    @property
    def verdict(self) -> str:
        """The same in a word."""
        return "missed" if not self.holds else "same" if self.difference == 0 else "within"


@dataclass(frozen=True)
class Reproduction:
    """A recorded result beside that of the new run."""

    recipe: str  # its name
    is_locked: bool  # whether it gives the hashes of checkpoint and data
    run: Path
    recorded: Result
    now: Result
    comparisons: tuple[Comparison, ...]

    @property
    def succeeded(self) -> bool:
        """Whether every number holds."""
        return all(comparison.holds for comparison in self.comparisons)


def reproduce(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    config_file: Path | None = None,
    output_dir: Path | None = None,
    tolerance: float | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
) -> Reproduction:
    """Train a recipe again and compare what comes out with what it records.

    It is compared with the result of the same hardware if there is one, else with the newest.

    Args:
        recipe: path or name.
        overrides: `section.key=value`; only of where checkpoint and data lie, and of what is logged and saved.
        config_file: an accelerate config; None: the user's default.
        output_dir: folder of the run; None: runs/reproduce/ and the recipe's name.
        tolerance: largest difference that is accepted; None: the recorded one's own.
        resume: go on with an earlier reproduction in the folder; one that is done is only compared again.
        trust_remote_code: run code that the checkpoint's repository holds.

    Raises:
        UserError: the recipe records no result; or a mistake in recipe, data, launch or output folder.
        TrainingFailed: the run failed.
        Interrupted: a signal came; the run can be gone on from.
    """
    check_tolerance(tolerance)
    of_launch(config_file)  # its mistakes are told: the launcher would end at the first of them, with a traceback
    name, path = find_recipe(recipe)
    asked = load_recipe(path, overrides)
    if not asked.results:
        raise UserError(
            f"{path}: it records no result to compare with; train it, then write the result into it: accel-trainer record RUN"
        )
    refuse_other_steps(as_written(path), asked)
    folder = RunFolder((output_dir or Path("runs") / "reproduce" / name).absolute())
    command = [*LAUNCHER, *(["--config_file", str(config_file)] if config_file else []), "--quiet", "-m", TRAINER]
    command += [str(path.absolute()), *overrides, "--output_dir", str(folder.path)]
    command += [*["--resume"] * resume, *["--trust_remote_code"] * trust_remote_code]
    with interrupted_by_signals():
        train(command, folder, resume=resume)
    now = result_of(folder.path)
    recorded = comparable(asked, now)
    is_locked = asked.dataset.sha256 is not None and (asked.model.checkpoint is None or asked.model.sha256 is not None)
    return Reproduction(name, is_locked, folder.path, recorded, now, compare(recorded, now, tolerance))


def refuse_other_steps(recipe: Recipe, asked: Recipe) -> None:
    """See that overrides leave what is computed as it is.

    Raises:
        UserError: they do not.
    """
    changed = differences(computed(taking(recipe, asked, WHERE)), computed(asked))
    if changed:
        keys = ", ".join(key for key, _, _ in changed)
        raise UserError(
            f"reproduce: {keys}: another value is another recipe, with results of its own (accel-trainer copy FROM TO); "
            f"override only where things lie: {', '.join(f'{name}.{key}' for name, keys in WHERE.items() for key in keys)}"
        )


def train(command: Sequence[str], folder: RunFolder, *, resume: bool) -> None:
    """Run the trainer to its end.

    Raises:
        UserError: it says that there is a mistake; or a run lies in the folder and is not to be resumed.
        TrainingFailed: it failed.
        Interrupted: it was.
    """
    with opened(folder, resume=resume):
        before = folder.status()
        if before:  # so that what it says afterwards is this launch's
            folder.set_status("running", before.get("step") or 0)
    started = folder.status()
    try:
        code, _ = launched(command, shown=True)
    except BaseException:
        with suppress(RunFolderError), folder.locked(patience=GRACE):  # the trainer outlives its launcher, to save
            pass
        raise
    finally:
        status = folder.status()
        said_nothing = status == started
        # A run that is done stays so, where the launch met a mistake before it went on with it.
        is_kept = before.get("state") == "done" and status.get("exit_code") == EXIT_USER_MISTAKE
        if before and (said_nothing or is_kept):
            write_json(folder.path / "status.json", before)
    status = {} if said_nothing else status
    reason = str(status.get("reason") or f"the launch ended with exit code {code}; what it said stands above")
    if status.get("state") == "interrupted":
        raise Interrupted(reason)
    if status.get("exit_code") == EXIT_USER_MISTAKE:
        raise UserError(reason)
    if code != EXIT_DONE or status.get("state") != "done":
        raise TrainingFailed(reason)


def comparable(recipe: Recipe, now: Result) -> Result:
    """The recorded result to compare with: of the same hardware, else the newest."""
    same = [result for result in recipe.results if result.hardware == now.hardware]
    found = newest(same or recipe.results)
    assert found is not None
    return found


def compare(recorded: Result, now: Result, tolerance: float | None = None) -> tuple[Comparison, ...]:
    """Every recorded number beside the new one."""
    limit = recorded.tolerance if tolerance is None else tolerance
    return tuple(
        Comparison(f"{role} {metric}", rounded(value), now.metrics.get(role, {}).get(metric), limit)
        for role, values in recorded.metrics.items()
        for metric, value in values.items()
    )


def print_reproduction(reproduction: Reproduction) -> None:
    """A row for each number, and the verdict."""
    recorded, now = reproduction.recorded, reproduction.now
    say(f"recorded  {recorded.date}  step {recorded.step}  {recorded.hardware}")
    say(f"now       {now.date}  step {now.step}  {now.hardware}\n")
    shown = reproduction.comparisons
    styles: list[Style] = ["" if comparison.holds else "red" for comparison in shown]
    rows = [
        [
            comparison.metric,
            f"{comparison.recorded:.6g}",
            "none" if comparison.now is None else f"{comparison.now:.6g}",
            "" if comparison.now is None else f"{comparison.difference:.2g}",
            f"{comparison.tolerance:g}",
            comparison.verdict,
        ]
        for comparison in shown
    ]
    headers = ["metric", "recorded", "now", "difference", "tolerance", "verdict"]
    print_table(headers, rows, numbers=range(1, 5), styles=styles)
    missed = [comparison.metric for comparison in shown if not comparison.holds]
    if not missed:
        say(f"\n{reproduction.recipe}: reproduced", "green")
        return
    say(f"\n{reproduction.recipe}: NOT reproduced: {', '.join(missed)}", "red")
    for package in sorted(recorded.versions.keys() & now.versions.keys()):
        if recorded.versions[package] != now.versions[package]:
            say(f"{package} was {recorded.versions[package]} and is {now.versions[package]}")
    if not reproduction.is_locked:
        say("the recipe does not pin its checkpoint and data, which may have changed: accel-trainer lock")

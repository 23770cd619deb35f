"""A run's result, written into the recipe that it is a run of: `accel-trainer record RUN`.

A recipe that says what it came to, on what and with which versions, can be asked for it again (`reproduction`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accel_trainer.differences import FIXED_BY_A_RUN, PLACES, differences, short
from accel_trainer.errors import RunFolderError, UserError
from accel_trainer.library import find_recipe, is_file
from accel_trainer.recipe import Recipe, Result
from accel_trainer.recipe_edit import alone_with, changing, edit
from accel_trainer.recipe_file import as_written, load_recipe, parse_recipe
from accel_trainer.results import check_tolerance, rounded
from accel_trainer.results_table import library_of, write_table
from accel_trainer.run_folder import RunFolder

PACKAGES = ("accel_trainer", "torch", "transformers", "accelerate", "datasets")
PRECISIONS = {"no": "float32"}
MOST_SHOWN = 20  # differences

# Where the bytes lie; where a recipe gives their SHA-256 they may lie anywhere.
WHERE = {section: [key for key in keys if key != "sha256"] for section, keys in PLACES.items()}
_COMMIT = re.compile(r"[0-9a-f]{40}")


def record(run: Path, recipe: str | None = None, tolerance: float | None = None) -> Path:
    """Write what a run came to into its recipe's file, and into the table of the library that it lies in.

    A result of the same hardware gives way to the new one; the others, and all that its author wrote, stay.

    Args:
        run: its folder.
        recipe: path or name; None: the one that it was started with.
        tolerance: largest difference from these numbers that a reproduction may show; None: as before, or the default.

    Returns:
        the recipe's file.

    Raises:
        UserError: the run is not done, or is not what the recipe says now; or the file cannot be written.
    """
    check_tolerance(tolerance)
    result = result_of(run)
    path = recipe_of(run) if recipe is None else find_recipe(recipe)[1].absolute()
    with changing(path) as change:
        now = load_recipe(path)
        refuse_other(run, path, now)
        results = [_plain(entry) for entry in merged(now.results, result, tolerance)]
        change.text = edit(change.text, {("results",): results})
        parse_recipe(change.text, str(path), base=path.parent)  # raises what a reader would
    library = library_of(path)
    if library is not None:
        with alone_with(library / "README.md"):  # of what all others have recorded by now
            write_table(library)
    return path


def result_of(run: Path) -> Result:
    """What a run came to.

    Raises:
        RunFolderError: it is not done, or a file of it is missing.
    """
    folder = RunFolder(run)
    status = folder.status()
    if status.get("state") != "done":
        state = (
            f"the run is {status['state']}, at step {status.get('step')}" if "state" in status else "there is no run"
        )
        raise RunFolderError(f"{run}: {state}; give the folder of a run that is done, or go on with it (--resume)")
    results, facts = folder.scores(), folder.facts()
    for path, found in ((folder.results, results), (folder.run, facts)):
        if not found:
            raise RunFolderError(f"{path}: it is missing or empty; give the folder of a run that is done")
    if "started_at" not in facts:
        raise RunFolderError(f"{folder.run}: an earlier version wrote it, without the day of the run; train again")
    recipe = as_written(folder.recipe)
    metrics = {
        role: {name: rounded(value) for name, value in scores.items() if isinstance(value, float | int)}
        for role, scores in results.items()
        if role != "train"
    }
    if not metrics:
        raise RunFolderError(
            f"{folder.results}: no split was scored; give the recipe a labelled validation or test split"
        )
    try:
        train = results["train"]
        best = train["best_step"] if recipe.saving.load_best_model_at_end else None
        return Result(
            date=facts["started_at"][: len("2026-01-31")],
            step=train["steps"] if best is None else best,
            metrics=metrics,
            hardware=hardware_named(facts["hardware"]),
            duration=rounded(train["train_runtime"], 3),
            versions={package: facts["versions"][package] for package in PACKAGES if facts["versions"].get(package)},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else "a value is of the wrong kind"
        raise RunFolderError(
            f"{run}: {folder.run.name} and {folder.results.name} are not what a run leaves ({reason}); give another run, or "
            "train again"
        ) from error


def recipe_of(run: Path) -> Path:
    """The file of the recipe that a run was started with.

    Raises:
        RunFolderError: the run does not say, or the file is not there.
    """
    folder = RunFolder(run)
    told = (folder.facts().get("recipe") or {}).get("path")
    path = Path(told) if isinstance(told, str) else None
    if path is None or not is_file(path):
        what = "it does not say which recipe it is a run of" if path is None else f"its recipe {path} is not here"
        raise RunFolderError(f"{folder.run}: {what}; name the recipe: --recipe NAME")
    return path


def refuse_other(run: Path, path: Path, recipe: Recipe) -> None:
    """See that a run computed what a recipe says now.

    Raises:
        UserError: it did not; every key that differs is named.
    """
    changed = unlike(recipe, as_written(RunFolder(run).recipe))
    if changed:
        lines = [
            f"  {key}: {short(ran)} in the run, {short(said)} in the recipe" for key, said, ran in changed[:MOST_SHOWN]
        ]
        more = [f"  and {len(changed) - MOST_SHOWN} more"] if len(changed) > MOST_SHOWN else []
        raise UserError(
            "\n".join([f"{run}: the run is not one of {path} as it stands:", *lines, *more])
            + "\ngive the recipe these values, run it again without overrides, or make the run a recipe of its own "
            "(accel-trainer copy RUN NEW) and name that: --recipe NEW"
        )


def unlike(recipe: Recipe, run: Recipe) -> list[tuple[str, Any, Any]]:
    """Dotted keys on which a result depends, and in which a run's recipe is not what `recipe` says, with both values.

    What a run pins and the recipe leaves open is no difference; nor is where the bytes lie, where the recipe gives their hash.
    """
    taken: dict[str, list[str]] = {}
    for name, where in WHERE.items():
        section = getattr(recipe, name)
        fixed = [key.removeprefix(f"{name}.") for key in FIXED_BY_A_RUN if key.startswith(f"{name}.")]
        taken[name] = [key for key in fixed if _is_open(getattr(section, key))]
        taken[name] += where if section.sha256 is not None else []
    return differences(computed(taking(recipe, run, taken)), computed(run))


def taking(recipe: Recipe, other: Recipe, keys: Mapping[str, Sequence[str]]) -> Recipe:
    """A recipe with some keys of some sections as another one has them."""
    sections = {
        name: getattr(recipe, name).model_copy(update={key: getattr(getattr(other, name), key) for key in names})
        for name, names in keys.items()
    }
    return recipe.model_copy(update=sections)


def _is_open(value: Any) -> bool:
    """Whether a value that a run pins is left out, or the name of a branch or tag, which may move."""
    return value is None or (isinstance(value, str) and _COMMIT.fullmatch(value) is None)


def computed(recipe: Recipe) -> dict[str, Any]:
    """All that a recipe's result depends on."""
    values = recipe.model_dump(include={"problem_type", "dataset", "model", "training", "evaluation"})
    values["evaluation"]["eval_steps"] = recipe.eval_steps if recipe.evaluation.eval_strategy == "steps" else None
    return {**values, "saving": {"load_best_model_at_end": recipe.saving.load_best_model_at_end}}


def merged(results: Sequence[Result], new: Result, tolerance: float | None) -> list[Result]:
    """Results by day, `new` in the place of those from the same hardware, whose tolerance it keeps if none is given."""
    same = [result.hardware == new.hardware for result in results]
    if tolerance is None and any(same):
        tolerance = results[same.index(True)].tolerance
    new = new if tolerance is None else new.model_copy(update={"tolerance": tolerance})
    kept = [result for result, replaced in zip(results, same, strict=True) if not replaced]
    return sorted([*kept, new], key=lambda result: result.date)


def hardware_named(facts: dict[str, Any]) -> str:
    """What a run ran on in a few words, from its run.json."""
    count, device, precision = facts["num_processes"], facts["device"], facts["mixed_precision"]
    words = [
        "1 process" if count == 1 else f"{count} processes",
        device if device == "cpu" else facts["device_name"],
        PRECISIONS.get(precision, precision),
    ]
    compiled = facts["dynamo_backend"].lower()
    return ", ".join([*words, *([f"compiled by {compiled}"] if compiled != "no" else [])])


def _plain(result: Result) -> dict[str, Any]:
    """A result as it stands in a recipe."""
    values = result.model_dump(exclude_none=True)
    return {key: value for key, value in values.items() if value not in ("", {})}

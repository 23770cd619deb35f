"""A recipe, an accelerate config and this machine, looked at together before anything is started: every mistake at once.

    recipe ── recipe_file ──────▶ schema, rules, paths ─┐
              what they name ───▶ files, columns, packages ├─▶ mistakes, in reading order
    config ── accelerate_config ▶ keys, rules ──────────┤
              recipe and config ▶ what does not go together ┘

Nothing is loaded: no torch, no data beyond the first line of a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from accel_trainer.accelerate_config import AccelerateConfig, examine
from accel_trainer.draft import Draft
from accel_trainer.errors import Mistake, RecipeError, UserError
from accel_trainer.library import find_recipe
from accel_trainer.on_disk import report_files
from accel_trainer.recipe import Recipe
from accel_trainer.recipe_file import examine_recipe, reading_order

# Trackers whose package has another name, or several.
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}


def check_all(
    recipes: Sequence[str], overrides: Sequence[str] = (), config_file: Path | None = None
) -> dict[str, list[Mistake]]:
    """Every mistake by what was given: the recipes, and the accelerate config, read once.

    With a recipe stands what it and the config do not agree about.
    """
    config, of_config = (None, []) if config_file is None else examine(config_file)
    found = {recipe: _mistakes(recipe, overrides, config) for recipe in recipes}
    return found | ({} if config_file is None else {str(config_file): of_config})


def _mistakes(recipe: str, overrides: Sequence[str], config: AccelerateConfig | None) -> list[Mistake]:
    try:
        read, draft = examine_recipe(find_recipe(recipe)[1], overrides)
    except RecipeError as error:
        return [*error.mistakes]
    except UserError as error:  # there is no such recipe
        what, _, remedy = str(error).removeprefix(f"{recipe}: ").partition("; ")
        return [Mistake(recipe, None, "", what, remedy)]
    report_files(read, draft)
    _report_trackers(read, draft)
    return [
        *sorted(draft.mistakes, key=reading_order),
        *(() if config is None else _misfits(read, draft, config)),
    ]


def _report_trackers(recipe: Recipe, draft: Draft) -> None:
    for i, tracker in enumerate(recipe.tracking.report_to):
        if not any(map(_is_installed, _PACKAGES.get(tracker, (tracker,)))):
            keys = ("tracking", "report_to", i)
            at = keys if keys in draft.spots else keys[:-1]
            draft.fault(at, f"{tracker} is not installed here", f"pip install {tracker}, or take it out of the list")


def _is_installed(package: str) -> bool:
    spec = find_spec(package)
    return (
        spec is not None and spec.origin is not None
    )  # a folder of that name, such as a tracker's runs, has no origin


def _misfits(recipe: Recipe, draft: Draft, config: AccelerateConfig) -> Iterator[Mistake]:
    """What the recipe asks for and the hardware cannot give."""
    batch, processes = recipe.training.global_batch_size, config.num_processes
    place = _place(draft, "global_batch_size")
    if place and processes > batch:
        yield Mistake(
            str(config.path),
            config.lines.get("num_processes"),
            "num_processes",
            f"{processes} processes share the {batch} examples of a step (training.global_batch_size, {place}): "
            f"{processes - batch} would never have one",
            f"use {batch} processes at most, or a larger global_batch_size, with which the recipe is another one",
        )
    place = _place(draft, "optim")
    if place and recipe.training.optim == "adafactor" and config.distributed_type == "FSDP":
        yield Mistake(
            str(config.path),
            config.lines.get("distributed_type"),
            "distributed_type",
            f"adafactor (training.optim, {place}) averages over rows and columns of whole weights, of which FSDP leaves no "
            "process more than a share",
            "use multi_gpu.yaml",
        )


def _place(draft: Draft, name: str) -> str:
    """Where a key of the recipe's training section stands; empty where it stands nowhere, or is a mistake itself."""
    keys = ("training", name)
    if keys in draft.faulty or keys not in draft.spots:
        return ""
    spot = draft.spot(keys)
    return spot.source if spot.line is None else f"{spot.source}:{spot.line}"

"""The commands as functions, for notebooks and programs: `from accel_trainer import load_recipe, train, predict`.

    results = train("quickstart", "training.max_steps=50", output_dir="runs/try")
    predict("runs/try", ["worth the wait"])

Errors are raised instead of printed: `accel_trainer.errors` has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel_trainer.errors import UserError
from accel_trainer.recipe import Recipe

if TYPE_CHECKING:
    from accel_trainer.predict import Predictor


def load_recipe(recipe: str | Path, *overrides: str) -> Recipe:
    """A recipe by path or name, with `section.key=value` overrides applied in order.

    Raises:
        UserError: there is no such recipe, or it has mistakes: all of them, with their lines.
    """
    from accel_trainer import recipe_file
    from accel_trainer.library import find_recipe

    return recipe_file.load_recipe(find_recipe(str(recipe))[1], overrides)


def train(
    recipe: str | Path | Recipe, *overrides: str, output_dir: str | Path | None = None, **options: Any
) -> dict[str, Any]:
    """Train, evaluate and save what a recipe says, as `python -m accel_trainer.train` does.

    Under `accelerate.notebook_launcher(train, args=("quickstart",), num_processes=2)` it trains on several processes.

    Args:
        recipe: path or name; or a recipe as `load_recipe` gives it.
        overrides: `section.key=value`; of a recipe that is loaded already, none.
        output_dir: folder of the run; None: runs/ and the recipe's name.
        options: those of the command line, by their names: resume, layout, max_tokens_per_device, dry_run, … (`train_options.Options`).

    Returns:
        the contents of results.json.

    Raises:
        UserError: a mistake of the user's, in recipe, data, launch or output folder.
        Interrupted: a signal came; what was done is saved.
        TrainingFailed: training cannot go on.
    """
    from accel_trainer import collectives, train_options
    from accel_trainer import train as trainer
    from accel_trainer.origin import origin_of
    from accel_trainer.tracking import speak_on

    unknown = sorted(options.keys() - {option.name for option in fields(train_options.Options)})
    if unknown:
        close = get_close_matches(unknown[0], [option.name for option in fields(train_options.Options)], 1)
        guess = f"; did you mean {close[0]}?" if close else "; values of the recipe are given as section.key=value"
        raise UserError(f"train: there is no option {unknown[0]}{guess}")
    speak_on(collectives.is_first_process())
    if isinstance(recipe, Recipe):
        if overrides or output_dir is None:
            raise UserError(
                "train: give overrides to load_recipe, and an output_dir, for a recipe that is loaded already"
            )
        return trainer.train(recipe, train_options.Options(Path(output_dir).expanduser().absolute(), **options))
    return trainer.train_recipe(
        origin_of(str(recipe), overrides), None if output_dir is None else Path(output_dir), **options
    )


def predict(
    model: str | Path | Predictor,
    texts: str | Sequence[str],
    text_pairs: str | Sequence[str] | None = None,
    *,
    max_tokens_per_device: int | None = None,
    trust_remote_code: bool = False,
) -> list[dict[str, Any]]:
    """Label texts, as `accel-trainer predict` does.

    Args:
        model: folder of a run or of a model, a Hub id; or what `predict.load_predictor` gave, to load it once.
        texts: one or several.
        text_pairs: the second texts of pairs, as many.
        max_tokens_per_device: tokens at once; None: derived from the device.
        trust_remote_code: run code that the model's repository holds.

    Returns:
        for each text, in order: {"prediction": label, "probabilities": {label: share}}.

    Raises:
        UserError: there is no such model, or not as many second texts.
    """
    from accel_trainer.predict import load_predictor, predict_texts

    listed = [texts] if isinstance(texts, str) else list(texts)
    pairs = [text_pairs] if isinstance(text_pairs, str) else text_pairs
    for i, text in enumerate([*listed, *(pairs or [])]):
        if not isinstance(text, str):
            raise UserError(f"predict: text {i % max(len(listed), 1)} is {text!r}; give texts")
    if pairs is not None and len(pairs) != len(listed):
        raise UserError(f"predict: {len(listed)} texts and {len(pairs)} second texts; give as many")
    if not listed:
        return []
    if isinstance(model, str | Path):
        model = load_predictor(
            str(model), max_tokens_per_device=max_tokens_per_device, trust_remote_code=trust_remote_code
        )
    return predict_texts(model, listed, None if pairs is None else list(pairs))

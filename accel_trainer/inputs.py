"""All that a recipe names, read and checked before anything is computed: data, tokenizer, model, metrics."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from accel_trainer import collectives, metrics
from accel_trainer.data import LabelledData, Split, load_labelled, tokenise
from accel_trainer.differences import PLACES, differences, short
from accel_trainer.errors import UserError
from accel_trainer.hub_data import reach_hub
from accel_trainer.model import build_model, load_config, weights_sha256
from accel_trainer.model_files import check_files, pinned_files
from accel_trainer.recipe import Recipe
from accel_trainer.tokenization import load_tokenizer, longest_input, tokenizer_sha256

# Entries of a model's config that no step depends on.
NOT_MATHEMATICS = frozenset({"_name_or_path", "architectures", "transformers_version", "dtype", "id2label", "label2id"})


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


def read_inputs_together(accelerator: Accelerator, recipe: Recipe, *, trust_remote_code: bool = False) -> Inputs:
    """`read_inputs`, by the first process of each machine before the others, so that the caches are written once.

    Raises:
        UserError: on every process, if it showed on any; or they have different recipes, data or initial weights.
    """
    check_same(accelerator, without_places(recipe), "were given different recipes", "give every machine the same one")
    with collectives.together(accelerator), collectives.first_process_first(accelerator):
        inputs = read_inputs(recipe, trust_remote_code=trust_remote_code)
    check_same(
        accelerator,
        {"initial weights": inputs.initial_sha256, **mathematics(inputs)},
        "read different data or made different initial weights",
        "give every machine the same files, the same checkpoint and the same versions of torch and transformers",
    )
    return inputs


def check_same(accelerator: Accelerator, own: dict[str, Any], what: str, remedy: str) -> None:
    """See that all processes have the same, where each has its own from files of its own. Collective.

    Args:
        accelerator: the run's.
        own: this process's, as JSON.
        what: they did, if they do not.
        remedy: what to do then.

    Raises:
        UserError: they do not.
    """
    first = collectives.from_main_process(accelerator, own)
    with collectives.together(accelerator):
        changed = differences(first, own)
        if changed:
            here = f"process {accelerator.process_index}"
            shown = [f"  {key}: {short(one)} on process 0, {short(other)} on {here}" for key, one, other in changed[:5]]
            more = [f"  and {len(changed) - 5} more"] if len(changed) > 5 else []
            raise UserError("\n".join([f"the processes {what}; {remedy}:", *shown, *more]))


def read_inputs(recipe: Recipe, *, trust_remote_code: bool = False) -> Inputs:
    """Read and check the data, the tokenizer, the model and the metrics.

    Raises:
        UserError: any of them is not as the recipe says.
    """
    reach_hub(recipe)
    check_files(recipe.model)
    loaded = metrics.load_metrics(recipe.evaluation.metrics, allow_remote_code=trust_remote_code)
    data = load_labelled(recipe.dataset)
    training_texts = (
        text for texts, pairs in data.roles["train"].texts(recipe.dataset) for text in [*texts, *(pairs or [])]
    )
    check_metrics(recipe, loaded, len(data.label_names))
    tokenizer = load_tokenizer(recipe.model, training_texts, trust_remote_code=trust_remote_code)
    config = load_config(recipe.model, data.label_names, tokenizer, trust_remote_code=trust_remote_code)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"model.tokenizer: it has {len(tokenizer)} tokens, but the model has embeddings for {config.vocab_size}; use the "
            "checkpoint's own tokenizer"
        )
    max_length = longest_input(recipe.dataset.max_length, tokenizer, config)
    tokenizer.model_max_length = max_length  # travels with the model, so that pipelines cut where training did
    splits = {role: tokenise(rows, recipe.dataset, tokenizer, max_length) for role, rows in data.roles.items()}
    model = build_model(recipe.model, config, recipe.training.seed, trust_remote_code=trust_remote_code)
    return Inputs(
        recipe=pinned(recipe, data, max_length),
        splits=splits,
        label_names=data.label_names,
        tokenizer=tokenizer,
        model=model,
        initial_sha256=weights_sha256(model.state_dict()),
        metrics=loaded,
        notes=[*data.notes, *truncation_notes(splits, max_length)],
    )


def check_metrics(recipe: Recipe, loaded: dict[str, Any], num_labels: int) -> None:
    """See that the metrics can be computed and produce the one that decides what is best.

    Raises:
        UserError: they cannot, or do not; better now than after the first epoch.
    """
    produced = metrics.produced_names(loaded, num_labels, recipe.evaluation.average)
    best = recipe.evaluation.best_metric
    if best not in produced:
        raise UserError(
            f"evaluation.metric_for_best_model: {best} is not among the numbers that the metrics produce; choose from "
            f"{', '.join(produced)}"
        )


def truncation_notes(splits: dict[str, Split], max_length: int) -> list[str]:
    """One line per split that was cut to the maximum length."""
    return [
        f"{role}: {split.tokens.truncated} of {len(split)} rows ({split.tokens.truncated / len(split):.1%}) are longer than "
        f"{max_length} tokens and were cut"
        for role, split in splits.items()
        if split.tokens.truncated
    ]


def pinned(recipe: Recipe, data: LabelledData, max_length: int) -> Recipe:
    """The recipe with what could mean something else tomorrow fixed: commits, files, rows, maximum length, labels."""
    dataset = recipe.dataset.model_copy(
        update={
            "revision": data.revision or recipe.dataset.revision,
            "max_length": max_length,
            "labels": recipe.dataset.labels or data.label_names,
            "sha256": {role: rows.sha256 for role, rows in data.roles.items()},
        }
    )
    return recipe.model_copy(update={"dataset": dataset, "model": pinned_files(recipe.model)})


def without_places(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON, but for where data and checkpoints lie: what was read is compared by its hash."""
    values = recipe.model_dump(mode="json")
    for section, places in PLACES.items():
        for key in places:
            del values[section][key]
    return values


def mathematics(inputs: Inputs) -> dict[str, Any]:
    """All that the steps of a run are a function of, as JSON; where the data lie and what is logged is left out."""
    recipe = without_places(inputs.recipe)
    config = json.loads(inputs.model.config.to_json_string(use_diff=True))
    return {
        **{section: recipe[section] for section in ("dataset", "model", "training", "evaluation")},
        "data": {role: split.rows.sha256 for role, split in inputs.splits.items()},
        "labels": inputs.label_names,
        "tokenizer": tokenizer_sha256(inputs.tokenizer),
        "config": {key: value for key, value in config.items() if key not in NOT_MATHEMATICS},
    }

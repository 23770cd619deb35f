"""The end of a run: the best weights, every split scored, and what is left in the folder."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file

from accel_trainer import artifacts, collectives, metrics
from accel_trainer.errors import Interrupted, RunFolderError
from accel_trainer.evaluation import Logits
from accel_trainer.run import Run, received, save, throughput, write_model
from accel_trainer.run_folder import write_json
from accel_trainer.scoring import logits_of, score
from accel_trainer.signals import StopRequest
from accel_trainer.tracking import print_scores

SCORED = ("validation", "test")  # at the end, in this order


def finish(run: Run, stop: StopRequest) -> dict[str, Any]:
    """Take the best weights if the recipe says so, score every split, and write what the run leaves.

    Returns:
        the contents of results.json.

    Raises:
        Interrupted: a signal came; a checkpoint of the last step is there.
    """
    unsaved = run.plan.save_every is None
    last = {name: weight.clone() for name, weight in run.inputs.model.state_dict().items()} if unsaved else {}
    step = take_best_weights(run)
    try:
        logits = {role: logits_of(run, run.inputs.splits[role], stop) for role in SCORED if role in run.inputs.splits}
    except Interrupted:
        if unsaved:
            run.inputs.model.load_state_dict(last)
            save(run)
        raise
    return write_results(run, step, logits)


def take_best_weights(run: Run) -> int:
    """Let the model have the best weights, if the recipe says so and there are any.

    Returns:
        the step of the weights that it has.

    Raises:
        RunFolderError: they are gone or damaged.
    """
    if not run.inputs.recipe.saving.load_best_model_at_end or run.state.best_step is None:
        return run.state.step
    weights: dict[str, torch.Tensor] | None = None
    with collectives.together(run.accelerator):
        if run.is_main:
            if run.folder.weights_step(run.folder.best) != run.state.best_step:
                raise RunFolderError(
                    f"{run.folder.best}: the weights of step {run.state.best_step} are not there or damaged; bring them back, or "
                    "set saving.load_best_model_at_end=false, and run again with --resume"
                )
            weights = load_file(run.folder.best / "model.safetensors")
    run.inputs.model.load_state_dict(received(run, weights))
    return run.state.best_step


def write_results(run: Run, step: int, logits: dict[str, Logits]) -> dict[str, Any]:
    """Score the splits; write predictions, model and results.json.

    Args:
        run: at its end.
        step: of the model's weights.
        logits: of every split, by role.

    Returns:
        the contents of results.json.
    """
    inputs = run.inputs
    results: dict[str, Any] = {"train": throughput(run)}
    scores: dict[str, dict[str, float]] = {}
    for role, computed in logits.items():
        split = inputs.splits[role]
        if split.rows.is_labelled:
            scores[role] = score(run, split, computed)
            details = metrics.detailed_report(computed, split.rows.labels, inputs.label_names)
            results[role] = {**scores[role], **details}
        with collectives.together(run.accelerator):
            if run.is_main:
                records = artifacts.prediction_rows(split, inputs.recipe.dataset, computed, inputs.label_names)
                run.folder.write_predictions(role, records)
    write_model(run, run.folder.model, scores, step)
    if run.is_main:
        write_json(run.folder.results, results)
    return results


def show(run: Run, results: dict[str, Any]) -> None:
    """Print what results.json holds, for people."""
    if not run.is_main:
        return
    scored = {role: results[role] for role in SCORED if role in results}
    for role, scores in scored.items():
        print(f"\n{role}\n{metrics.classification_report(scores)}")
    print_scores(
        {role: {name: x for name, x in scores.items() if isinstance(x, float)} for role, scores in scored.items()}
    )
    print(f"\nrun: {run.folder.path}\nmodel: {run.folder.model}", flush=True)

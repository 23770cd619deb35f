"""What a split scores: its logits, computed by all processes in smaller micro-batches if need be, and the metrics of them."""

from __future__ import annotations

from accel_trainer import metrics
from accel_trainer.collectives import gather_object
from accel_trainer.data import Split
from accel_trainer.endings import halve_token_budget
from accel_trainer.errors import OutOfMemory
from accel_trainer.evaluation import Logits, predict_logits
from accel_trainer.run import Run, shapes_of
from accel_trainer.signals import StopRequest


def logits_of(run: Run, split: Split, stop: StopRequest) -> Logits:
    """Logits of a split, in smaller micro-batches if they do not fit; the same on every process.

    Raises:
        Interrupted: a signal came.
    """
    while True:
        try:
            return predict_logits(
                run.accelerator,
                run.model,
                split.tokens,
                run.max_tokens,
                packed=run.packed,
                shapes=shapes_of(run, split.tokens),
                between=stop.between(run.accelerator),
            )
        except OutOfMemory as error:
            halve_token_budget(run, error)


def score(run: Run, split: Split, logits: Logits) -> dict[str, float]:
    """The recipe's metrics and the plain loss of a labelled split; the main process's numbers on all, which decide by them."""
    average = run.inputs.recipe.evaluation.average
    computed = metrics.compute_metrics(run.inputs.metrics, logits, split.rows.labels, average=average)
    return gather_object([computed])[0]  # type: ignore[no-any-return]

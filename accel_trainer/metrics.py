"""How good the predictions are: shipped metrics, foreign metrics, and the report per class.

    recipe's names ─ load_metrics ─▶ modules ─ compute_metrics(logits, labels) ─▶ {"loss": …, "f1": …}
                                                detailed_report(logits, labels) ─▶ per class, confusion matrix
                                                                                 └ classification_report ─▶ text

The five metrics that the package ships are `evaluate` modules with scikit-learn inside (`shipped_metrics`). They need no
network and write no file, so that every process may make its own. Any other name is a script on the Hub: it runs only
where the name is in evaluate's own namespace, or where the user said so on the command line.

`evaluate` and scikit-learn are imported when the first score is computed, not with this module: they take a good half second
(benchmarks/start_up.py), which neither the first training step nor a prediction should wait for.

Shapes: n rows, c = `num_labels` classes of the recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any, Protocol, TypedDict

import huggingface_hub
import numpy as np
import numpy.typing as npt

from accel_trainer.errors import UserError
from accel_trainer.recipe import SHIPPED_METRICS
from accel_trainer.terminal import aligned

ClassIds = npt.NDArray[np.integer[Any]]  # (n,)
Logits = npt.NDArray[np.floating[Any]]  # (n, c)


AVERAGED = ("precision", "recall", "f1")  # shipped metrics with a score per class


class ClassScores(TypedDict):
    """Scores of one class against all others, each from 0 to 1; `support` counts its true rows."""

    precision: float
    recall: float
    f1: float
    support: int


class DetailedReport(TypedDict):
    """What JSON can hold of an evaluation: the classes in the order of their ids, c × c counts of rows."""

    per_class: dict[str, ClassScores]
    averages: dict[str, ClassScores]  # macro, micro, weighted
    confusion_matrix: list[list[int]]  # [true][predicted]


# ── metrics by name ───────────────────────────────────────────────────────────────────────────────────────────────────


class Metric(Protocol):
    """What a recipe's metric can do: all modules of `evaluate` can."""

    def compute(self, *, predictions: Any, references: Any, **options: Any) -> Any:
        """The scores of (n,) predicted and (n,) true class ids, by name."""


@dataclass(frozen=True)
class Shipped:
    """A metric of the package, by name; its module is imported and made when a score is wanted."""

    name: str

    def compute(self, *, predictions: Any, references: Any, **options: Any) -> Any:
        """The score under the metric's name; options as those of `shipped_metrics`."""
        from accel_trainer.shipped_metrics import SHIPPED

        return SHIPPED[self.name]().compute(predictions=predictions, references=references, **options)


def load_metrics(names: Sequence[str], allow_remote_code: bool = False) -> dict[str, Metric]:
    """The metrics that `evaluation.metrics` names, in its order.

    Names that the package does not ship go to `evaluate.load`, which fetches a script from the Hub and runs it; each is
    then tried on two rows, so that one that does not fit classification fails now and not after an hour of training.
    A name with an owner (`owner/name`) is anybody's script and needs `allow_remote_code`.

    Raises:
        UserError: a name is unknown, out of reach, not a metric of class ids, or stands for code that nobody allowed.
    """
    return {
        name: Shipped(name) if name in SHIPPED_METRICS else _load_foreign(name, allow_remote_code) for name in names
    }


def _load_foreign(name: str, allow_remote_code: bool) -> Metric:
    """A metric that `evaluate.load` finds by `name`, tried on two rows."""
    shipped = f"the package ships {', '.join(SHIPPED_METRICS)}"
    if name == "loss":
        raise UserError("evaluation.metrics: loss is always reported; leave it out")
    # evaluate.load("rouge") would run ./rouge/rouge.py before it asks the Hub
    if name.endswith(".py") or Path(name).exists():
        raise UserError(
            f"evaluation.metrics: {name} names a local file or folder, and no code is run from a recipe; "
            f"name a metric of the Hub, or rename what lies here ({shipped})"
        )
    if "/" in name and not allow_remote_code:
        raise UserError(
            f"evaluation.metrics: {name} is a script of its owner on the Hub, and would run on this machine; "
            f"pass --trust_remote_code if you trust it ({shipped})"
        )
    import evaluate

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        evaluate.config.HF_EVALUATE_OFFLINE = True  # evaluate 0.4.6 heeds only this one of its own
    try:
        metric: Metric = evaluate.load(name, module_type="metric", keep_in_memory=True)
    except Exception as error:  # the script's own code runs here: it may raise anything
        unreachable = isinstance(error, FileNotFoundError | ConnectionError)
        reason = "the Hub has no such metric, or cannot be reached" if unreachable else str(error)
        close = get_close_matches(name.lower(), SHIPPED_METRICS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"evaluation.metrics: {name} cannot be loaded: {reason}; {hint}{shipped}, other metrics need the Hub"
        ) from error
    _measure(name, metric, np.array([0, 1]), np.array([0, 1]), {})
    return metric


def compute_metrics(metrics: Mapping[str, Metric], logits: Logits, labels: ClassIds, average: str) -> dict[str, float]:
    """The mean loss and every metric of the labelled rows.

    Precision, recall and f1 are over all c classes, so that a class without rows in a small split counts in macro, with
    zero; `average="binary"` is the class with the higher id. A prediction is the class of the largest logit, the lowest
    id among equals. A foreign metric's value has the metric's name, its further numbers `name_key`.

    Args:
        metrics: name → module, as `load_metrics` gives them.
        logits: (n, c), n ≥ 1, c ≥ 2; where one is not finite, the loss is nan.
        labels: (n,), class ids from 0 to c - 1; rows without a label (-1) are the caller's to leave out.
        average: macro, micro, weighted or binary.

    Raises:
        UserError: `average` is binary and c is not 2, or a foreign metric cannot be computed.
    """
    predictions = _predicted(logits, labels)
    num_labels = logits.shape[1]
    _check_average(average, num_labels)
    results = {"loss": mean_cross_entropy(logits, labels)}
    for name, metric in metrics.items():
        averaged = isinstance(metric, Shipped) and metric.name in AVERAGED
        options = {"average": average, "labels": range(num_labels)} if averaged else {}
        results |= _measure(name, metric, predictions, labels, options)
    return results


def produced_names(metrics: Mapping[str, Metric], num_labels: int, average: str) -> list[str]:
    """Names of what `compute_metrics` gives for c classes; foreign metrics are tried on one row per class.

    Raises:
        UserError: as `compute_metrics`.
    """
    _check_average(average, num_labels)
    ids = np.arange(num_labels)
    names = (
        [name] if isinstance(metric, Shipped) else _measure(name, metric, ids, ids, {})
        for name, metric in metrics.items()
    )
    return ["loss", *(name for group in names for name in group)]


def _check_average(average: str, num_labels: int) -> None:
    if average == "binary" and num_labels != 2:
        raise UserError(f"evaluation.average: binary with {num_labels} labels; use macro, micro or weighted")


def _measure(
    name: str, metric: Metric, predictions: ClassIds, labels: ClassIds, options: Mapping[str, Any]
) -> dict[str, float]:
    """The numbers that a metric makes of (n,) predictions and (n,) labels: its own as `name`, others as `name_key`."""
    try:
        result = metric.compute(predictions=predictions, references=labels, **options)
    except Exception as error:
        if isinstance(metric, Shipped):
            raise
        raise UserError(
            f"evaluation.metrics: {name} cannot be computed from predicted and true class ids: {error}; leave it out"
        ) from error
    values = result if isinstance(result, Mapping) else {name: result}
    numbers = {key: float(value) for key, value in values.items() if _is_number(value)}
    if not numbers:
        raise UserError(f"evaluation.metrics: {name} gives no number; leave it out")
    own_keys = {name, name.rpartition("/")[2]} if len(numbers) > 1 else set(numbers)
    return {name if key in own_keys else f"{name}_{key}": number for key, number in numbers.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def mean_cross_entropy(logits: Logits, labels: ClassIds) -> float:
    """Sum over rows of log Σ exp(logits) - logits[label], ÷ n: in float64, unweighted, unsmoothed.

    The row's maximum is taken off first, which keeps every exponential at 1 or below. Logits (n, c), labels (n,).
    """
    if not np.isfinite(logits).all():
        return math.nan
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]  # (n,)
    return float(losses.sum() / len(losses))


def _predicted(logits: Logits, labels: ClassIds) -> ClassIds:
    """Class ids (n,) of the largest logits; a nan counts as largest."""
    n, num_labels = logits.shape
    assert labels.shape == (n,), (labels.shape, logits.shape)
    assert n >= 1
    assert num_labels >= 2
    assert np.issubdtype(labels.dtype, np.integer), labels.dtype
    assert labels.min() >= 0, "rows without a label cannot be scored"
    assert labels.max() < num_labels, (labels.max(), num_labels)
    predictions: ClassIds = logits.argmax(axis=1)
    return predictions


def improved(metric_value: float, best_so_far: float | None, greater_is_better: bool, threshold: float = 0.0) -> bool:
    """Whether a value beats the best so far by more than `threshold`, in the metric's own unit.

    The first value does; nan never does.
    """
    if math.isnan(metric_value):
        return False
    if best_so_far is None:
        return True
    gain = metric_value - best_so_far if greater_is_better else best_so_far - metric_value
    return gain > threshold


# ── the report per class ──────────────────────────────────────────────────────────────────────────────────────────────


def detailed_report(logits: Logits, labels: ClassIds, label_names: Sequence[str]) -> DetailedReport:
    """Precision, recall, f1 and true rows of each class, and the confusion matrix, ready for JSON.

    A score whose denominator is zero is 0.

    Args:
        logits: (n, c), n ≥ 1.
        labels: (n,), class ids from 0 to c - 1.
        label_names: c distinct names in the order of their ids.
    """
    import sklearn.metrics

    predictions = _predicted(logits, labels)
    assert len(set(label_names)) == len(label_names) == logits.shape[1], label_names
    ids = range(len(label_names))
    columns = sklearn.metrics.precision_recall_fscore_support(labels, predictions, labels=ids, zero_division=0.0)
    per_class = {
        name: ClassScores(precision=float(precision), recall=float(recall), f1=float(f1), support=int(support))
        for name, precision, recall, f1, support in zip(label_names, *columns, strict=True)
    }
    matrix = sklearn.metrics.confusion_matrix(labels, predictions, labels=ids)
    classes, right = list(per_class.values()), int(matrix.trace())
    micro = right / len(labels)  # of one label each: precision, recall and f1 are then the accuracy
    averages = {
        "macro": _mean_scores(classes, [1] * len(classes), len(labels)),
        "micro": ClassScores(precision=micro, recall=micro, f1=micro, support=len(labels)),
        "weighted": _mean_scores(classes, [scores["support"] for scores in classes], len(labels)),
    }
    return DetailedReport(per_class=per_class, averages=averages, confusion_matrix=matrix.tolist())


def classification_report(report: DetailedReport) -> str:
    """The report as text for a terminal: scores per class and joined, then the confusion matrix.

    Columns of the matrix are headed by class id, which keeps many classes narrow. Macro is the mean over all classes,
    weighted the mean by true rows, accuracy the diagonal ÷ all rows.
    """
    per_class, matrix = report["per_class"], report["confusion_matrix"]
    averages = report["averages"]

    def score_row(title: str, scores: ClassScores) -> list[str]:
        numbers = (scores["precision"], scores["recall"], scores["f1"])
        return [title, *(f"{number:.4f}" for number in numbers), str(scores["support"])]

    scores = [
        ["", "precision", "recall", "f1", "support"],
        *(score_row(name, scores) for name, scores in per_class.items()),
        score_row("macro", averages["macro"]),
        score_row("weighted", averages["weighted"]),
        ["accuracy", "", "", f"{averages['micro']['f1']:.4f}", str(averages["micro"]["support"])],
    ]
    confusion = [
        ["", *(str(label) for label in range(len(per_class)))],
        *([f"{label} {name}", *map(str, matrix[label])] for label, name in enumerate(per_class)),
    ]
    return f"{aligned(scores)}\n\nconfusion matrix: rows true, columns predicted\n{aligned(confusion)}"


def _mean_scores(classes: Sequence[ClassScores], weights: Sequence[int], support: int) -> ClassScores:
    """Weighted mean over the classes: sum of weight × score ÷ sum of weights."""

    def mean(values: Sequence[float]) -> float:
        return math.fsum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)

    return ClassScores(
        precision=mean([scores["precision"] for scores in classes]),
        recall=mean([scores["recall"] for scores in classes]),
        f1=mean([scores["f1"] for scores in classes]),
        support=support,
    )

"""How good the predictions are: shipped metrics, foreign metrics, and the report per class.

    recipe's names ─ load_metrics ─▶ modules ─ compute_metrics(logits, labels) ─▶ {"loss": …, "f1": …}
                                                detailed_report(logits, labels) ─▶ per class, confusion matrix
                                                                                 └ classification_report ─▶ text

The five metrics that the package ships are `evaluate` modules with scikit-learn inside. They need no network and write
no file, so that every process may make its own. Any other name is a script on the Hub: it runs only where the name is
in evaluate's own namespace, or where the user said so on the command line.

Shapes: n rows, c = `num_labels` classes of the recipe. Importing `evaluate` costs seconds (it imports torch).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import evaluate
import huggingface_hub
import numpy as np
import numpy.typing as npt
import sklearn.metrics
from datasets import Features, Value
from rich.cells import cell_len
from typing_extensions import override

from accel_trainer.errors import UserError

ClassIds = npt.NDArray[np.integer[Any]]  # (n,)
Logits = npt.NDArray[np.floating[Any]]  # (n, c)


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


# ── the shipped metrics ───────────────────────────────────────────────────────────────────────────────────────────────


class ShippedMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """An `evaluate` metric over class ids, in memory unless asked otherwise."""

    summary: ClassVar[str]
    reference_url: ClassVar[str]

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **kwargs: Any) -> None:
        super().__init__(config_name, keep_in_memory, **kwargs)

    @override
    def _build_data_dir(self) -> str:
        # evaluate makes this folder in the user's cache even for a metric that stays in memory (0.4.6)
        return str(self._data_dir_root) if self.keep_in_memory else str(super()._build_data_dir())

    @override
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.summary,
            citation="",
            inputs_description="predictions, references: class ids, one per row.",
            features=Features({"predictions": Value("int64"), "references": Value("int64")}),
            format="numpy",
            reference_urls=[self.reference_url],
        )

    @override
    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any] | None:
        """The metric of all rows, those added before included, under the metric's name.

        Rows given here alone go straight to scikit-learn: a million takes tenths of a second, and seconds through the
        Arrow table that `evaluate` would build.

        Raises:
            ValueError: the two differ in length, or hold something else than class ids.
        """
        given = predictions is not None and references is not None
        added_before = self.writer is not None
        result: dict[str, Any] | None
        if given and not added_before and self.num_process == 1:
            result = self._compute(predictions=_class_ids(predictions), references=_class_ids(references), **kwargs)
        else:
            result = super().compute(predictions=predictions, references=references, **kwargs)
        return result


class Accuracy(ShippedMetric):
    """Rows predicted right ÷ all rows."""

    summary = "Share of the rows whose predicted class is the true one."
    reference_url = "https://scikit-learn.org/stable/modules/model_evaluation.html#accuracy-score"

    @override
    def _compute(
        self, predictions: ClassIds, references: ClassIds, normalize: bool = True, sample_weight: Any = None
    ) -> dict[str, Any]:
        score = sklearn.metrics.accuracy_score(
            references, predictions, normalize=normalize, sample_weight=sample_weight
        )
        return {"accuracy": float(score)}


class AveragedMetric(ShippedMetric):
    """A score per class, joined by `average`.

    macro: mean over `labels`, each class counting the same; weighted: by true rows; micro: one score of all counts
    together; binary: the score of `pos_label` alone; None: a list, one score per class. `labels` are the class ids to
    join, None: those that occur. A class of `labels` without rows has the score `zero_division`, and counts.
    """

    score: ClassVar[Callable[..., Any]]  # (references, predictions, …) -> float, or (c,)

    @override
    def _compute(
        self,
        predictions: ClassIds,
        references: ClassIds,
        labels: Sequence[int] | None = None,
        pos_label: int = 1,
        average: str | None = "binary",
        sample_weight: Any = None,
        zero_division: float = 0.0,
    ) -> dict[str, Any]:
        score = self.score(
            references,
            predictions,
            labels=labels,
            pos_label=pos_label,
            average=average,
            sample_weight=sample_weight,
            zero_division=zero_division,
        )
        return {self.name: np.asarray(score, dtype=np.float64).tolist()}


class Precision(AveragedMetric):
    """Rows rightly predicted as the class ÷ rows predicted as it."""

    summary = "Of the rows predicted as a class, the share that truly belong to it."
    reference_url = "https://scikit-learn.org/stable/modules/model_evaluation.html#precision-recall-f-measure-metrics"
    score = staticmethod(sklearn.metrics.precision_score)


class Recall(AveragedMetric):
    """Rows rightly predicted as the class ÷ rows that truly belong to it."""

    summary = "Of the rows that belong to a class, the share that was predicted as it."
    reference_url = Precision.reference_url
    score = staticmethod(sklearn.metrics.recall_score)


class F1(AveragedMetric):
    """Harmonic mean of a class's precision and recall, 2·TP ÷ (2·TP + FP + FN)."""

    summary = "Harmonic mean of precision and recall of a class."
    reference_url = Precision.reference_url
    score = staticmethod(sklearn.metrics.f1_score)


class MatthewsCorrelation(ShippedMetric):
    """Correlation of true and predicted classes, from -1 to 1; 0 where either side has a single class.

    For more than two classes it is Gorodkin's R_K (2004, doi:10.1016/j.compbiolchem.2004.09.006).
    """

    summary = "Correlation between the true and the predicted classes; 0 is no better than chance."
    reference_url = "https://scikit-learn.org/stable/modules/model_evaluation.html#matthews-correlation-coefficient"

    @override
    def _compute(self, predictions: ClassIds, references: ClassIds, sample_weight: Any = None) -> dict[str, Any]:
        # scikit-learn says 0 as well, but warns when both sides are the same single class
        if len(np.unique(predictions)) < 2 or len(np.unique(references)) < 2:
            return {"matthews_correlation": 0.0}
        score = sklearn.metrics.matthews_corrcoef(references, predictions, sample_weight=sample_weight)
        return {"matthews_correlation": float(score)}


def _class_ids(values: Any) -> ClassIds:
    """`values` as int64, shape (n,); floats are taken where they are whole numbers."""
    given = np.asarray(values)
    with np.errstate(invalid="ignore"):  # nan turns into some number, and differs from it
        ids: ClassIds = given.astype(np.int64)
    if ids.ndim != 1 or not np.array_equal(ids, given):
        raise ValueError(f"class ids are whole numbers, one per row; here is {given.dtype} of shape {given.shape}")
    return ids


SHIPPED: dict[str, type[ShippedMetric]] = {
    "accuracy": Accuracy,
    "precision": Precision,
    "recall": Recall,
    "f1": F1,
    "matthews_correlation": MatthewsCorrelation,
}

# ── metrics by name ───────────────────────────────────────────────────────────────────────────────────────────────────


def load_metrics(names: Sequence[str], allow_remote_code: bool = False) -> dict[str, evaluate.EvaluationModule]:
    """The metrics that `evaluation.metrics` names, in its order.

    Names that the package does not ship go to `evaluate.load`, which fetches a script from the Hub and runs it; each is
    then tried on two rows, so that one that does not fit classification fails now and not after an hour of training.
    A name with an owner (`owner/name`) is anybody's script and needs `allow_remote_code`.

    Raises:
        UserError: a name is unknown, out of reach, not a metric of class ids, or stands for code that nobody allowed.
    """
    return {name: SHIPPED[name]() if name in SHIPPED else _load_foreign(name, allow_remote_code) for name in names}


def _load_foreign(name: str, allow_remote_code: bool) -> evaluate.EvaluationModule:
    """A metric that `evaluate.load` finds by `name`, tried on two rows."""
    shipped = f"the package ships {', '.join(SHIPPED)}"
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
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        evaluate.config.HF_EVALUATE_OFFLINE = True  # evaluate 0.4.6 heeds only this one of its own
    try:
        metric = evaluate.load(name, module_type="metric", keep_in_memory=True)
    except Exception as error:  # the script's own code runs here: it may raise anything
        unreachable = isinstance(error, FileNotFoundError | ConnectionError)
        reason = "the Hub has no such metric, or cannot be reached" if unreachable else str(error)
        close = get_close_matches(name.lower(), SHIPPED, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"evaluation.metrics: {name} cannot be loaded: {reason}; {hint}{shipped}, other metrics need the Hub"
        ) from error
    _measure(name, metric, np.array([0, 1]), np.array([0, 1]), {})
    return metric


def compute_metrics(
    metrics: Mapping[str, evaluate.EvaluationModule], logits: Logits, labels: ClassIds, average: str
) -> dict[str, float]:
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
    if average == "binary" and num_labels != 2:
        raise UserError(f"evaluation.average: binary with {num_labels} labels; use macro, micro or weighted")
    results = {"loss": mean_cross_entropy(logits, labels)}
    for name, metric in metrics.items():
        options = {"average": average, "labels": range(num_labels)} if isinstance(metric, AveragedMetric) else {}
        results |= _measure(name, metric, predictions, labels, options)
    return results


def _measure(
    name: str, metric: evaluate.EvaluationModule, predictions: ClassIds, labels: ClassIds, options: Mapping[str, Any]
) -> dict[str, float]:
    """The numbers that a metric makes of (n,) predictions and (n,) labels: its own as `name`, others as `name_key`."""
    try:
        result = metric.compute(predictions=predictions, references=labels, **options)
    except Exception as error:
        if isinstance(metric, ShippedMetric):
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
    return f"{_aligned(scores)}\n\nconfusion matrix: rows true, columns predicted\n{_aligned(confusion)}"


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


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, the first column to the left, by width on screen: a Chinese character takes two cells."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        gaps = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        numbers = (gap + cell for cell, gap in zip(row[1:], gaps[1:], strict=True))
        lines.append("  ".join([row[0] + gaps[0], *numbers]).rstrip())
    return "\n".join(lines)

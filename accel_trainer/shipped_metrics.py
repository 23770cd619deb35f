"""The five metrics that the package ships: `evaluate` modules with scikit-learn inside, without network and files.

They are apart from `metrics` because they import `evaluate`, whose own imports (transformers' pipelines, scipy.stats, scikit-learn)
take a good half second of a start; `metrics` imports this module when the first score is computed.

Shapes: n rows, c classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import evaluate
import numpy as np
import numpy.typing as npt
import sklearn.metrics
from datasets import Features, Value
from typing_extensions import override

ClassIds = npt.NDArray[np.integer[Any]]  # (n,)


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

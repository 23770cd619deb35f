"""The recipe: what a training run computes, and nothing about where it runs.

A recipe is plain data: frozen, every key known, every value typed. Reading one from YAML, with line numbers and
overrides, is `recipe_file`'s job; this module holds the meaning. It imports neither torch nor transformers, so that
checking a recipe costs milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import override

from accel_trainer.splits import parse_slices

# Metrics that this package ships (`metrics`), and the shorter list that `average` applies to.
SHIPPED_METRICS = ("accuracy", "precision", "recall", "f1", "matthews_correlation")
LOWER_IS_BETTER = ("loss",)
# What other libraries call them, letters and digits alone. None of these is a metric of `evaluate`.
_METRICS_ELSEWHERE = {"acc": "accuracy", "mcc": "matthews_correlation", "matthewscorrcoef": "matthews_correlation"}
# A metric of `evaluate`'s own namespace, or of somebody's (`owner/name`).
_METRIC_NAME = re.compile(r"[a-z0-9][a-z0-9_]*|[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<!\.py)")

# Keyword arguments of the schedules in transformers' `get_scheduler`, by schedule.
SCHEDULER_KWARGS: dict[str, frozenset[str]] = {
    "linear": frozenset(),
    "cosine": frozenset({"num_cycles"}),
    "cosine_with_restarts": frozenset({"num_cycles"}),
    "polynomial": frozenset({"lr_end", "power"}),
    "constant": frozenset(),
    "constant_with_warmup": frozenset(),
    "inverse_sqrt": frozenset({"timescale"}),
    "cosine_with_min_lr": frozenset({"num_cycles", "min_lr", "min_lr_rate"}),
    "warmup_stable_decay": frozenset({"num_decay_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"}),
}

CURVES = ("linear", "cosine", "1-sqrt")  # what warmup_type and decay_type may be

# Passed as the context of `model_validate`: leave `rules` to the caller, who wants to hear all of them at once.
RULES_LATER = object()

PositiveInt = Annotated[int, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]
SplitSource = str | PositiveInt | Annotated[float, Field(gt=0, lt=1)]


class Broken(NamedTuple):
    """A rule between fields that does not hold: the field to blame, what is wrong, what to do."""

    field: str  # of the section that states the rule; dotted where it lies deeper
    what: str
    remedy: str
    also: tuple[str, ...] = ()  # the other fields that the rule looks at; where one is faulty itself, nothing is known


class Section(BaseModel):
    """A frozen part of a recipe; an unknown key is a mistake, and so is a value of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def rules(self) -> Iterator[Broken]:
        """The rules between this section's fields that do not hold."""
        yield from ()

    @model_validator(mode="after")
    def _holds(self, info: ValidationInfo) -> Self:
        broken = () if info.context is RULES_LATER else tuple(self.rules())
        if broken:  # all of them travel in the context, so that a reader can report each at its own line
            text = "; ".join(f"{rule.field}: {rule.what}; {rule.remedy}" for rule in broken)
            raise PydanticCustomError("rules", "{text}", {"text": text, "broken": broken})
        return self


def shipped_metric_meant(name: str) -> str | None:
    """The metric of the package that a name which is none of `evaluate`'s seems to mean; None where it means none.

    So `acuracy`, `F1`, `f1_score` and `eval_acc` are answered at once, and not by the Hub, which has no such metric.
    """
    plain = re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("eval_")).removesuffix("score")
    for average in ("macro", "micro", "weighted", "binary"):
        plain = plain.removeprefix(average).removesuffix(average)
    shipped = {re.sub("_", "", metric): metric for metric in SHIPPED_METRICS} | _METRICS_ELSEWHERE
    close = [plain] if plain in shipped else get_close_matches(plain, shipped, 1, 0.8)
    return shipped[close[0]] if close and "/" not in name else None


class SplitsSection(Section):
    """Which rows play which role. Roles are explicit, so that test rows can never reach training.

    Either every role is a slice of a named split (`train[:8000]`, `train[80%:]`, joined with `+`), or every role is a
    share (0.8) or a number of rows (6000) drawn, seeded and stratified by label, from the one table that `dataset` holds.
    """

    train: SplitSource = Field(description="Rows to train on: a slice such as `train[:8000]`, a share, or a row count.")
    validation: SplitSource | None = Field(None, description="Rows for the evaluations during training.")
    test: SplitSource | None = Field(None, description="Rows evaluated once, after training; may be unlabelled (-1).")

    def roles(self) -> dict[str, str | int | float]:
        """The roles that are given, in the order train, validation, test."""
        return {role: source for role, source in self if source is not None}

    @override
    def rules(self) -> Iterator[Broken]:
        sources, others = self.roles().values(), ("validation", "test")
        for role, source in self.roles().items():
            if isinstance(source, str):
                try:
                    parse_slices(source)
                except ValueError as error:
                    yield Broken(role, str(error), "write it like train[:8000] or train[80%:], joined with +")
        if len({isinstance(source, str) for source in sources}) > 1:
            mixed = "slices of named splits stand beside shares of one table"
            yield Broken("train", mixed, "use one kind for all roles", others)
        if sum(source for source in sources if isinstance(source, float)) > 1 + 1e-9:
            much = "the shares of all roles add up to more than 1"
            yield Broken("train", much, "make them add up to 1 or less", others)


class DatasetSection(Section):
    """The labelled text."""

    path: str | None = Field(
        None, description="Hub id (`stanfordnlp/imdb`), folder, file, or `hf://`, `s3://` address."
    )
    name: str | None = Field(None, description="Configuration of a Hub dataset, such as `sst2` of `nyu-mll/glue`.")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub dataset; null: main.")
    data_files: str | list[str] | dict[str, str | list[str]] | None = Field(
        None,
        description="File, files, or split name → files; relative to `path` where that is a folder. Globs allowed.",
    )
    encoding: str | None = Field(
        None,
        description="Text encoding of CSV, TSV, JSON and text files; null: utf-8 (with or without BOM), then gb18030.",
    )
    shuffle_seed: int | None = Field(
        None,
        ge=0,
        description="Shuffle each source split with this seed before slicing it; null: keep the file's order.",
    )
    splits: SplitsSection
    max_train_samples: PositiveInt | None = Field(
        None, description="Train on a seeded random subset of this many rows."
    )
    max_eval_samples: PositiveInt | None = Field(
        None, description="Validate on a seeded random subset of this many rows."
    )
    max_predict_samples: PositiveInt | None = Field(
        None, description="Test on a seeded random subset of this many rows."
    )
    text_column: str = Field("text", description="Column that holds the text.")
    text_pair_column: str | None = Field(None, description="Column of the second text, for sentence pairs.")
    label_column: str = Field("label", description="Column that holds the label, as text or as an integer from 0.")
    labels: list[str] | dict[str, str] | None = Field(
        None,
        description="Label names in the order of their ids; or {value in the file: name}; null: as the data name them.",
    )
    max_length: Annotated[int, Field(ge=4)] | None = Field(
        None, description="Longest input in tokens, special tokens included; null: the checkpoint's maximum."
    )
    sha256: dict[str, str] | None = Field(
        None, description="Role → SHA-256 of its texts and labels, in order. Other rows are refused."
    )

    @property
    def text_columns(self) -> list[str]:
        """The column of the texts and, for pairs, that of the second texts."""
        return [self.text_column] + ([self.text_pair_column] if self.text_pair_column else [])

    @property
    def draw_seed(self) -> int:
        """Seed of the draws: `shuffle_seed`, or 42 where the file's order is kept.

        Not `training.seed`: repeating a run with another one must not exchange its test rows.
        """
        return 42 if self.shuffle_seed is None else self.shuffle_seed

    def label_names(self) -> list[str] | None:
        """Distinct label names in the order of their ids, where the recipe gives them."""
        names = self.labels.values() if isinstance(self.labels, dict) else self.labels
        return None if names is None else list(dict.fromkeys(names))

    @override
    def rules(self) -> Iterator[Broken]:
        if not self.path and not self.data_files:
            remedy = "give path (Hub id, folder or file) or data_files"
            yield Broken("path", "no data are named", remedy, ("data_files",))
        names = self.label_names()
        if names is not None and len(names) < 2:
            yield Broken("labels", "fewer than two classes are named", "name all of them, in the order of their ids")
        elif names is not None and isinstance(self.labels, list) and len(names) < len(self.labels):
            yield Broken("labels", "a class is named twice", "give every id a name of its own")
        if self.text_pair_column == self.text_column:
            remedy = "name the column that holds the second text"
            yield Broken("text_pair_column", "it is text_column again", remedy, ("text_column",))
        if self.label_column in self.text_columns:
            same = "text_column" if self.label_column == self.text_column else "text_pair_column"
            yield Broken("label_column", f"it is {same} too", "name the column that holds the label", (same,))


class TokenizerTraining(Section):
    """A WordPiece vocabulary trained on the training split, for a model made from its config."""

    vocab_size: PositiveInt = Field(8000, description="Word pieces, special tokens included.")
    lowercase: bool = Field(True, description="Lowercase and strip accents before splitting.")
    min_frequency: PositiveInt = Field(2, description="Occurrences that a pair of pieces needs to be merged.")


class ModelSection(Section):
    """The encoder and its classification head."""

    checkpoint: str | None = Field(None, description="Hub id or folder, such as an earlier run's `model/`.")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub checkpoint; null: main.")
    from_config: dict[str, Any] | None = Field(
        None, description="A new model instead: `model_type` and the arguments of its transformers config."
    )
    sha256: dict[str, str] | None = Field(
        None, description="File of the checkpoint, or of `tokenizer/`, → its SHA-256. Other bytes are refused."
    )
    tokenizer: str | None = Field(None, description="Hub id or folder of another tokenizer; null: the checkpoint's.")
    tokenizer_revision: str | None = Field(
        None, description="Branch, tag or commit of a Hub `tokenizer`; null: main. The checkpoint's follows `revision`."
    )
    train_tokenizer: TokenizerTraining | None = Field(
        None, description="Train a WordPiece tokenizer on the training split; only with `from_config`."
    )
    hidden_dropout: Probability | None = Field(None, description="Drop probability in the encoder; null: checkpoint's.")
    attention_dropout: Probability | None = Field(
        None, description="Drop probability of attention weights; null: checkpoint's; 0.0: the fastest path."
    )
    classifier_dropout: Probability | None = Field(
        None, description="Drop probability before the head; null: checkpoint's."
    )
    freeze_embeddings: bool = Field(False, description="Keep the embeddings as they are.")
    freeze_layers: Annotated[int, Field(ge=0)] = Field(
        0, description="Keep the embeddings and the first N encoder layers as they are."
    )

    @override
    def rules(self) -> Iterator[Broken]:
        if (self.checkpoint is None) == (self.from_config is None):
            both = "both stand here" if self.checkpoint else "neither is given"
            remedy = "give one: a trained model, or a new one"
            yield Broken("checkpoint", f"checkpoint or from_config: {both}", remedy, ("from_config",))
        if self.from_config is not None:
            if not isinstance(self.from_config.get("model_type"), str):
                yield Broken("from_config", "model_type is missing", "add it, such as model_type: bert")
            if (self.tokenizer is None) == (self.train_tokenizer is None):
                remedy, others = "give one of tokenizer and train_tokenizer", ("tokenizer", "train_tokenizer")
                yield Broken("from_config", "a new model needs a tokenizer", remedy, others)
        elif self.train_tokenizer is not None:
            misfit = "it would not fit the checkpoint's embeddings"
            yield Broken("train_tokenizer", misfit, "use it with from_config only", ("from_config",))


class TrainingSection(Section):
    """The sequence of optimizer steps."""

    seed: int = Field(42, ge=0, lt=2**63, description="Seed of initial weights, order and dropout.")
    global_batch_size: PositiveInt = Field(
        description="Examples per optimizer step, over all processes, whatever the hardware."
    )
    num_train_epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Passes over the data; 0.5 is half a pass."
    )
    max_steps: PositiveInt | None = Field(
        None, description="Optimizer steps; where given, it wins over `num_train_epochs`."
    )
    optim: Literal["adamw_torch", "adafactor", "sgd"] = Field(
        "adamw_torch", description="Fused where the device has it."
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(description="Peak learning rate.")
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "warmup_stable_decay",
    ] = Field("linear", description="Schedule of the learning rate, moved once per optimizer step.")
    lr_scheduler_kwargs: dict[str, float | int | str] = Field(
        default_factory=dict, description="Further arguments of the schedule, such as num_cycles."
    )
    warmup_steps: Annotated[float, Field(ge=0)] = Field(
        0, description="Steps of linear warm-up; below 1: a share of the run."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Decoupled decay; not on biases and norms.")
    layerwise_lr_decay: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Factor on the learning rate per layer, counted down from the head; null: 1 everywhere."
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="Clip the gradient of the whole global batch to this norm; null: do not clip."
    )
    label_smoothing_factor: Probability = Field(0.0, description="Share of the target spread over all classes.")
    adam_beta1: Probability = Field(0.9, description="Decay of AdamW's first moment.")
    adam_beta2: Probability = Field(0.999, description="Decay of AdamW's second moment.")
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="Term in AdamW's denominator.")

    @override
    def rules(self) -> Iterator[Broken]:
        if self.max_steps is None and self.num_train_epochs is None:
            remedy = "give num_train_epochs or max_steps"
            yield Broken("num_train_epochs", "nothing says how long to train", remedy, ("max_steps",))
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            yield Broken(
                "warmup_steps", f"{self.warmup_steps} is no number of steps", "give whole steps, or a share below 1"
            )
        if self.max_steps is not None and self.warmup_steps > self.max_steps:
            longer = f"the warm-up is longer than max_steps, {self.max_steps}"
            yield Broken("warmup_steps", longer, "shorten it", ("max_steps",))
        if self.lr_scheduler_type == "constant" and self.warmup_steps > 0:
            remedy = "use constant_with_warmup, or set warmup_steps to 0"
            yield Broken("warmup_steps", "the schedule constant has no warm-up", remedy, ("lr_scheduler_type",))
        schedule, allowed = self.lr_scheduler_type, SCHEDULER_KWARGS[self.lr_scheduler_type]
        also = ("lr_scheduler_type",)
        for name in sorted(set(self.lr_scheduler_kwargs) - allowed):
            choice = f"it takes {', '.join(sorted(allowed))}" if allowed else "it takes no argument"
            yield Broken("lr_scheduler_kwargs", f"{schedule} does not know {name}", choice, also)
        for name, value in self.lr_scheduler_kwargs.items():
            if name in allowed and isinstance(value, str) and not name.endswith("_type"):
                yield Broken("lr_scheduler_kwargs", f"{name}: {value!r} is not a number", "give a number", also)
            if name in allowed and name.endswith("_type") and value not in CURVES:
                choice = f"choose from {', '.join(CURVES)}"
                yield Broken("lr_scheduler_kwargs", f"{name}: {value!r} is no curve", choice, also)
        if schedule == "warmup_stable_decay" and "num_decay_steps" not in self.lr_scheduler_kwargs:
            yield Broken("lr_scheduler_kwargs", f"{schedule} needs num_decay_steps", "add num_decay_steps: N", also)
        if schedule == "cosine_with_min_lr" and not {"min_lr", "min_lr_rate"} & set(self.lr_scheduler_kwargs):
            yield Broken("lr_scheduler_kwargs", f"{schedule} needs min_lr or min_lr_rate", "add one of them", also)
        yield from self._schedule_values()

    def _schedule_values(self) -> Iterator[Broken]:
        """What the schedule would refuse when the run has begun, or take for a curve that nobody means."""
        known = SCHEDULER_KWARGS[self.lr_scheduler_type] & set(self.lr_scheduler_kwargs)
        numbers = {
            name: value for name in sorted(known) if isinstance(value := self.lr_scheduler_kwargs[name], int | float)
        }
        also = ("lr_scheduler_type",)
        if {"min_lr", "min_lr_rate"} <= set(numbers):
            yield Broken("lr_scheduler_kwargs", "min_lr and min_lr_rate say the same in two ways", "keep one", also)
        for name, value in numbers.items():
            if value < 0:
                yield Broken("lr_scheduler_kwargs", f"{name}: {value} is below 0", "give a number from 0", also)
            elif name in ("lr_end", "min_lr") and value >= self.learning_rate:
                what = f"{name}: {value} is no end below the learning_rate, {self.learning_rate}"
                yield Broken("lr_scheduler_kwargs", what, "give a smaller number", (*also, "learning_rate"))
            elif name == "num_decay_steps" and value != int(value):
                yield Broken("lr_scheduler_kwargs", f"{name}: {value} is no number of steps", "give whole steps", also)
            elif name == "num_decay_steps" and self.max_steps is not None and value > self.max_steps:
                what = f"the decay is longer than max_steps, {self.max_steps}"
                yield Broken("lr_scheduler_kwargs", what, "shorten it", (*also, "max_steps"))


class EvaluationSection(Section):
    """What is measured, when, and what counts as best."""

    eval_strategy: Literal["no", "steps", "epoch"] = Field(
        "epoch", description="When the validation split is evaluated."
    )
    eval_steps: PositiveInt | None = Field(
        None, description="Optimizer steps between evaluations; null: logging_steps."
    )
    metrics: list[str] = Field(
        default_factory=lambda: ["accuracy", "precision", "recall", "f1"],
        description=f"Metrics of the package ({', '.join(SHIPPED_METRICS)}); other names go to evaluate.load.",
    )
    average: Literal["macro", "micro", "weighted", "binary"] = Field(
        "macro", description="How precision, recall and f1 join the classes; binary: of the class with the highest id."
    )
    metric_for_best_model: str | None = Field(
        None, description="Metric that decides which weights are best; null: loss."
    )
    greater_is_better: bool | None = Field(None, description="Null: true for every metric but the loss.")
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Stop after this many evaluations without improvement; null: never."
    )
    early_stopping_threshold: Annotated[float, Field(ge=0)] = Field(0.0, description="Improvement that counts as one.")

    @property
    def best_metric(self) -> str:
        """Name of the metric that decides which weights are best."""
        return self.metric_for_best_model or "loss"

    @property
    def best_is_greater(self) -> bool:
        """Whether a greater value of `best_metric` is better."""
        return self.best_metric not in LOWER_IS_BETTER if self.greater_is_better is None else self.greater_is_better

    @override
    def rules(self) -> Iterator[Broken]:
        if len(set(self.metrics)) < len(self.metrics):
            yield Broken("metrics", "a metric is named twice", "name each once")
        yield from self._metric_names()
        produced = ["loss", *self.metrics]
        # A metric from elsewhere may produce several numbers, called name_key; the trainer sees before its first step.
        foreign = tuple(f"{name}_" for name in self.metrics if name not in SHIPPED_METRICS)
        if self.best_metric not in produced and not (foreign and self.best_metric.startswith(foreign)):
            near = get_close_matches(self.best_metric, produced, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            remedy = f"{hint}choose from {', '.join(produced)}, or add it to metrics"
            yield Broken("metric_for_best_model", f"{self.best_metric} is not produced", remedy, ("metrics",))
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            remedy = "set eval_strategy to steps or epoch"
            yield Broken("early_stopping_patience", "there are no evaluations", remedy, ("eval_strategy",))

    def _metric_names(self) -> Iterator[Broken]:
        for name in self.metrics:
            if name in SHIPPED_METRICS:
                continue
            if name == "loss":
                yield Broken("metrics", "loss is always reported", "leave it out")
            elif meant := shipped_metric_meant(name):
                how = (
                    ", and give evaluation.average"
                    if any(word in name for word in ("macro", "micro", "weighted"))
                    else ""
                )
                yield Broken("metrics", f"there is no metric '{name}'", f"did you mean {meant}? write it so{how}")
            elif not _METRIC_NAME.fullmatch(name):
                remedy = f"choose from {', '.join(SHIPPED_METRICS)}, or name one of evaluate's, such as roc_auc"
                yield Broken("metrics", f"'{name}' is no name of a metric", remedy)


class SavingSection(Section):
    """What is written, when, and how much of it is kept."""

    save_strategy: Literal["no", "steps", "epoch"] = Field("epoch", description="When a checkpoint is written.")
    save_steps: PositiveInt | None = Field(None, description="Optimizer steps between checkpoints; needed for steps.")
    save_total_limit: PositiveInt | None = Field(None, description="Checkpoints kept; the oldest go first; null: all.")
    load_best_model_at_end: bool = Field(
        True, description="End with the best weights seen at an evaluation, not the last."
    )

    @override
    def rules(self) -> Iterator[Broken]:
        if self.save_strategy == "steps" and self.save_steps is None:
            remedy = "give the optimizer steps between checkpoints"
            yield Broken("save_steps", "it is missing", remedy, ("save_strategy",))


class TrackingSection(Section):
    """What is said while training."""

    logging_steps: PositiveInt = Field(10, description="Optimizer steps between logged lines.")
    report_to: list[
        Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]
    ] = Field(default_factory=list, description="Trackers, through Accelerate; each needs its package.")
    project_name: str = Field("accel_trainer", description="Project under which trackers file the run.")


class Result(Section):
    """What a run of the recipe came to, as `accel-trainer record` writes it and `reproduce` compares with."""

    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] = Field(description="Day of the run, YYYY-MM-DD.")
    step: Annotated[int, Field(ge=0)] = Field(description="Optimizer steps that the scored model was trained for.")
    metrics: dict[str, dict[str, float]] = Field(description="Role → metric → value, as in results.json.")
    tolerance: Annotated[float, Field(ge=0)] = Field(
        0.02, description="Largest difference from a recorded metric that `reproduce` accepts."
    )
    hardware: str = Field("", description="What it ran on, such as `2 processes, cpu, float32`.")
    duration: Annotated[float, Field(ge=0)] | None = Field(None, description="Seconds of training.")
    versions: dict[str, str] = Field(default_factory=dict, description="Package → version.")


class Recipe(Section):
    """One training run's mathematics: data, model, steps, metrics."""

    description: str = Field("", description="One line for people.")
    problem_type: Literal["single_label_classification"] = Field(
        "single_label_classification", description="Every text has exactly one of the labels."
    )
    source: str | None = Field(None, description="Where the settings were published: an address or a citation.")
    derived_from: str | None = Field(
        None,
        description="The recipe that this one was copied from, and its SHA-256, as `accel-trainer copy` writes it.",
    )
    dataset: DatasetSection
    model: ModelSection
    training: TrainingSection
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    saving: SavingSection = Field(default_factory=SavingSection)
    tracking: TrackingSection = Field(default_factory=TrackingSection)
    results: list[Result] = Field(default_factory=list, description="What runs of it came to; no step depends on them.")

    @override
    def rules(self) -> Iterator[Broken]:
        if self.dataset.splits.validation is None:
            for field in ("early_stopping_patience", "metric_for_best_model"):
                if getattr(self.evaluation, field) is not None:
                    remedy, also = "add dataset.splits.validation", ("dataset.splits.validation",)
                    yield Broken(f"evaluation.{field}", "there is no validation split", remedy, also)
        names = self.dataset.label_names()
        if self.evaluation.average == "binary" and names is not None and len(names) > 2:
            remedy, also = "use macro, micro or weighted", ("dataset.labels",)
            yield Broken("evaluation.average", f"binary with {len(names)} labels", remedy, also)

    @property
    def evaluates(self) -> bool:
        """Whether the validation split is evaluated during training."""
        return self.evaluation.eval_strategy != "no" and self.dataset.splits.validation is not None

    @property
    def eval_steps(self) -> int:
        """Optimizer steps between evaluations, for `eval_strategy: steps`."""
        return self.evaluation.eval_steps or self.tracking.logging_steps

"""Label text with a trained model, and score it on other data.

    accel-trainer predict RUN_OR_MODEL --text "…"
    accel-trainer predict RUN_OR_MODEL --input reviews.csv --output labelled.csv
    accel-trainer evaluate RUN_OR_MODEL --input other.csv

A file goes through in chunks, so that its size is bounded by the disk and not by memory; within a chunk rows are sorted
by length and put back in order.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from accel_trainer import hardware, metrics
from accel_trainer.artifacts import predictions
from accel_trainer.batching import smaller_budget
from accel_trainer.callable_module import make_callable
from accel_trainer.classifier import Classifier
from accel_trainer.data import rows_of_role
from accel_trainer.draft import Draft, Unreadable
from accel_trainer.errors import CannotLoad, DataError, OutOfMemory, UserError
from accel_trainer.evaluation import Logits, predict_logits
from accel_trainer.hub import is_on_hub, use_cache_if_unreachable
from accel_trainer.memory import prediction_needs
from accel_trainer.recipe import DatasetSection, EvaluationSection, Recipe, SplitsSection
from accel_trainer.sources import Table, read_files
from accel_trainer.tokenization import longest_input, tokens_of_texts
from accel_trainer.tracking import logger, quieten_libraries
from accel_trainer.writing import replaced
from accel_trainer.yaml_text import read_yaml

ROWS_AT_ONCE = 10_000  # rows in memory; enough for micro-batches of similar length, little enough for long texts


@dataclass
class Predictor:
    """A trained model ready to label text on the device at hand."""

    model: Classifier
    tokenizer: PreTrainedTokenizerBase
    accelerator: Accelerator
    label_names: list[str]
    max_length: int
    max_tokens: int
    recipe: Recipe | None  # of the run it came from, where that lies beside it

    def logits(self, texts: list[str], pairs: list[str] | None = None) -> Logits:
        """Logits of some texts, or pairs of texts, in their order; shape (texts, num_labels)."""
        tokens = tokens_of_texts(self.tokenizer, [texts] if pairs is None else [texts, pairs], self.max_length)
        while True:
            try:
                packed = self.model.is_known
                return predict_logits(self.accelerator, self.model, tokens, self.max_tokens, packed=packed)
            except OutOfMemory as error:
                if error.examples == 1:
                    raise OutOfMemory(f"{error}: a single text does not fit; use a larger device, or a CPU") from error
                self.max_tokens = smaller_budget(self.max_tokens, error.tokens)


def load_predictor(
    path: str, *, max_tokens_per_device: int | None = None, trust_remote_code: bool = False
) -> Predictor:
    """The model of a run, of a model folder, or of a Hub id.

    Raises:
        UserError: there is none.
    """
    quieten_libraries()
    folder = Path(path).expanduser()
    if not folder.exists() and _means_a_folder(path):
        siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        close = get_close_matches(folder.name, siblings, 1)
        guess = f" (did you mean {folder.parent / close[0]}?)" if close else ""
        raise UserError(f"{path}: no such folder{guess}; give the folder of a run or of a model, or a Hub id")
    if folder.is_dir() and (folder / "status.json").exists() and not (folder / "model").exists():
        raise UserError(f"{path}: the run has no model yet; let it end first (--resume), or name its best/ folder")
    run = folder if (folder / "model").is_dir() else folder.parent
    name = str(folder / "model") if (folder / "model").is_dir() else path
    recipe = None
    if folder.is_dir() and (run / "recipe.yaml").is_file() and (run / "run.json").is_file():
        # As it stands, without looking for the files it was trained on: they may be elsewhere by now.
        draft = Draft(str(run / "recipe.yaml"))
        try:
            values = read_yaml((run / "recipe.yaml").read_text(encoding="utf-8"), draft)
            recipe = None if draft.mistakes else Recipe.model_validate(values)
        except (OSError, ValueError, Unreadable):
            recipe = None
        if recipe is None:
            logger.warning(
                "%s: not a recipe of this version; columns and metrics are the usual ones", run / "recipe.yaml"
            )
    if is_on_hub(name):
        use_cache_if_unreachable()
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, SafetensorError) as error:
        raise CannotLoad("RUN_OR_MODEL", path, error) from error
    accelerator = hardware.start_accelerator()
    max_length = longest_input(None, tokenizer, model.config)
    classifier = Classifier(model)
    needs = prediction_needs(classifier, max_length, packed=classifier.is_known)
    return Predictor(
        model=classifier.to(accelerator.device).eval(),
        tokenizer=tokenizer,
        accelerator=accelerator,
        label_names=[str(model.config.id2label[i]) for i in range(model.config.num_labels)],
        max_length=max_length,
        max_tokens=hardware.tokens_per_device(accelerator, needs, max_tokens_per_device),
        recipe=recipe,
    )


def _means_a_folder(path: str) -> bool:
    """Whether a name is no Hub id, `name` or `owner/name`, or its first part is a folder here."""
    folder = Path(path)
    beside = len(folder.parts) == 2 and folder.parent.is_dir()
    return path.startswith(("/", "./", "../", "~")) or len(folder.parts) > 2 or beside


def predict_texts(predictor: Predictor, texts: list[str], pairs: list[str] | None = None) -> list[dict[str, Any]]:
    """Prediction and probabilities of each text, in order."""
    return predictions(predictor.logits(texts, pairs), predictor.label_names)


def predict_file(
    predictor: Predictor,
    source: Path,
    target: Path,
    text_column: str | None,
    text_pair_column: str | None = None,
    *,
    keep_formulas: bool = False,
) -> int:
    """Write the rows of a file with a prediction and probabilities each, in order.

    Args:
        predictor: the model.
        source: any table that `sources` reads.
        target: .csv, .tsv, .jsonl or .parquet; it appears when it is complete.
        text_column: column of the text; None: the recipe's.
        text_pair_column: column of the second text; None: the recipe's.
        keep_formulas: write cells that a spreadsheet would run into .csv and .tsv as they are.

    Returns:
        the number of rows.

    Raises:
        UserError: a column or text is missing, or the target cannot be written.
    """
    if target.resolve() == source.resolve():
        raise UserError(f"--output {target}: it is the input; write elsewhere")
    table = read_files([source])
    columns = _text_columns(predictor, table, text_column, text_pair_column)
    added = {"prediction", "probabilities", *(f"probability_{name}" for name in predictor.label_names)}
    carried = [name for name in table.data.column_names if name not in added]  # a labelled file may be labelled again
    schema = table.data.features.arrow_schema
    blank, first = 0, ""
    with open_writer(target, predictor.label_names, schema, carried, keep_formulas=keep_formulas) as writer:
        for start in range(0, len(table.data), ROWS_AT_ONCE):
            chunk = table.data[start : start + ROWS_AT_ONCE]
            texts = [_checked(chunk[column], column, table, start) for column in columns]
            empty = [i for i, cells in enumerate(zip(*texts, strict=True)) if not all(map(str.strip, cells))]
            blank, first = blank + len(empty), first or (table.place(start + empty[0]) if empty else "")
            records = predictions(predictor.logits(*texts), predictor.label_names)
            writer.write([{**{name: chunk[name][i] for name in carried}, **record} for i, record in enumerate(records)])
    if blank:
        logger.warning(
            "%s%s: there is no text, and the label given means nothing; complete or remove such rows",
            *(first, f" and {blank - 1} more row{'s' if blank > 2 else ''}" if blank > 1 else ""),
        )
    if writer.defused:
        logger.warning(
            "%s: %d cell%s that a spreadsheet would run as a formula begin%s with an apostrophe; --keep_formulas writes "
            "them as they are, and so do .jsonl and .parquet",
            *(target, writer.defused, *(("s", "") if writer.defused > 1 else ("", "s"))),
        )
    return len(table.data)


def _text_columns(predictor: Predictor, table: Table, text: str | None, pair: str | None) -> list[str]:
    dataset = predictor.recipe.dataset if predictor.recipe else None
    wanted = [
        text or (dataset.text_column if dataset else "text"),
        pair or (dataset.text_pair_column if dataset else None),
    ]
    columns = [column for column in wanted if column is not None]
    for column, option in zip(columns, ("--text_column", "--text_pair_column"), strict=False):
        if column not in table.data.column_names:
            raise DataError(
                f"{table.origins[0].name} has no column {column!r}; name the column of the text with {option}: "
                f"{', '.join(table.data.column_names)}"
            )
    return columns


def _checked(texts: list[Any], column: str, table: Table, start: int) -> list[str]:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            found = "no text" if text is None else f"{type(text).__name__}, not text"
            raise DataError(f"{table.place(start + i)}: column {column!r} holds {found}; complete or remove the row")
    return texts


class Writer(Protocol):
    """Takes records of one shape, chunk by chunk."""

    defused: int  # cells, column names included, that were marked as text for spreadsheets

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Append the records."""


# What makes a spreadsheet read a cell as a formula; tab and carriage return it skips before it looks.
_FORMULA = re.compile(r"[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def _defused(cell: Any) -> Any:
    """A cell that no spreadsheet runs: text that begins like a formula, and is no number, after an apostrophe."""
    if isinstance(cell, str) and _FORMULA.match(cell) and not _NUMBER.fullmatch(cell):
        return f"'{cell}"
    return cell


class _Jsonl:
    defused = 0

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        self._file.writelines(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)


class _Csv:
    def __init__(self, file: Any, delimiter: str, columns: list[str], *, keep_formulas: bool) -> None:
        self.defused = 0
        self._keep_formulas = keep_formulas
        self._columns = columns
        # "\r\n", because the module leaves a lone "\r" in a cell unquoted under any other line end.
        self._writer = csv.writer(file, delimiter=delimiter, lineterminator="\r\n")
        self._write(columns)

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        for record in records:
            shares = {f"probability_{name}": share for name, share in record["probabilities"].items()}
            cells = {**record, **shares}
            self._write([cells[column] for column in self._columns])

    def _write(self, cells: Sequence[Any]) -> None:
        if not self._keep_formulas:
            plain, cells = cells, [_defused(cell) for cell in cells]
            self.defused += sum(one is not other for one, other in zip(plain, cells, strict=True))
        self._writer.writerow(cells)


class _Parquet:
    defused = 0

    def __init__(self, writer: pyarrow.parquet.ParquetWriter) -> None:
        self._writer = writer

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        self._writer.write_table(pa.Table.from_pylist(list(records), schema=self._writer.schema))


@contextmanager
def open_writer(
    target: Path, label_names: list[str], schema: pa.Schema, carried: list[str], *, keep_formulas: bool = False
) -> Iterator[Writer]:
    """A writer for `target`, which appears under its name when the block ends well.

    Args:
        target: .csv, .tsv, .jsonl or .parquet.
        label_names: names by class id.
        schema: of the table whose columns are carried over.
        carried: their names.
        keep_formulas: leave text in .csv and .tsv as it is, whatever a spreadsheet makes of it.

    Raises:
        UserError: the suffix is unknown, or the file cannot be written.
    """
    suffix = target.suffix.lower()
    if suffix not in (".csv", ".tsv", ".jsonl", ".parquet"):
        raise UserError(f"--output {target}: unknown kind of file {suffix!r}; end it in .csv, .tsv, .jsonl or .parquet")
    try:
        with replaced(target) as writing:
            if suffix == ".parquet":
                shares = pa.struct([(name, pa.float64()) for name in label_names])
                added = [pa.field("prediction", pa.string()), pa.field("probabilities", shares)]
                columns = pa.schema([*(schema.field(name) for name in carried), *added])
                with pyarrow.parquet.ParquetWriter(writing, columns) as parquet:
                    yield _Parquet(parquet)
            else:
                with writing.open("w", encoding="utf-8", newline="" if suffix != ".jsonl" else None) as file:
                    names = [*carried, "prediction", *(f"probability_{name}" for name in label_names)]
                    if suffix == ".jsonl":
                        yield _Jsonl(file)
                    else:
                        yield _Csv(file, "," if suffix == ".csv" else "\t", names, keep_formulas=keep_formulas)
    except OSError as error:
        raise UserError(f"--output {target}: {error.strerror or error}; make space, or write elsewhere") from error


def evaluate_file(
    predictor: Predictor,
    source: Path,
    text_column: str | None = None,
    label_column: str | None = None,
    text_pair_column: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> tuple[dict[str, Any], str]:
    """The recipe's metrics on the labelled rows of a file.

    Returns:
        metrics with per-class scores and confusion matrix, as results.json has them; and the same as a table of text.

    Raises:
        UserError: a column is missing, or a label is unknown.
    """
    table = read_files([source])
    recipe = predictor.recipe
    dataset = recipe.dataset if recipe else DatasetSection(path=str(source), splits=SplitsSection(train="train"))
    settings = recipe.evaluation if recipe else EvaluationSection()
    columns = _text_columns(predictor, table, text_column, text_pair_column)
    section = dataset.model_copy(
        update={
            "text_column": columns[0],
            "text_pair_column": columns[1] if len(columns) > 1 else None,
            "label_column": label_column or dataset.label_column,
            "labels": dataset.labels or predictor.label_names,
            "sha256": None,
        }
    )
    rows = rows_of_role(section, "validation", table, np.arange(len(table.data)), predictor.label_names, [])
    if not rows.is_labelled:
        raise DataError(f"{source}: rows without a label cannot be scored; label them, or use predict")
    logits = np.concatenate([predictor.logits(texts, pairs) for texts, pairs in rows.texts(section, ROWS_AT_ONCE)])
    loaded = metrics.load_metrics(settings.metrics, allow_remote_code=trust_remote_code)
    scores = metrics.compute_metrics(loaded, logits, rows.labels, average=settings.average)
    details = metrics.detailed_report(logits, rows.labels, predictor.label_names)
    return {**scores, **details}, metrics.classification_report(details)


make_callable(__name__)  # `from accel_trainer import predict` is a function

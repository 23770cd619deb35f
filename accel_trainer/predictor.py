"""A trained model that labels text: read from a run, a folder or the Hub, and put on the device at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from accel_trainer import device_memory, hardware
from accel_trainer.artifacts import predictions, probabilities
from accel_trainer.batching import smaller_budget
from accel_trainer.classifier import Classifier
from accel_trainer.draft import Draft, Unreadable
from accel_trainer.errors import CannotLoad, DataError, OutOfMemory, UserError
from accel_trainer.evaluation import Logits, predict_logits
from accel_trainer.hub import is_on_hub, use_cache_if_unreachable
from accel_trainer.layout import has_few_shapes, packs
from accel_trainer.memory import prediction_needs
from accel_trainer.prediction_files import Shares, Writer
from accel_trainer.recipe import Recipe
from accel_trainer.shapes import Shape, fixed_shapes
from accel_trainer.tokenization import longest_input, tokens_of_texts
from accel_trainer.tracking import logger, quieten_libraries
from accel_trainer.yaml_text import read_yaml

ROWS_AT_ONCE = 10_000  # rows in memory; enough for micro-batches of similar length, little enough for long texts


@dataclass(frozen=True)
class Alone:
    """What predicting needs of an Accelerator, for one of several processes that has nothing to do with the others."""

    accelerator: Accelerator
    num_processes = 1
    process_index = 0

    @property
    def device(self) -> torch.device:
        """The device that the launch gave to this process."""
        device: torch.device = self.accelerator.device
        return device

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of the launch, while the block lasts."""
        context: AbstractContextManager[None] = self.accelerator.autocast()
        return context

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes: its own."""
        return tensor


@dataclass
class Predictor:
    """A trained model ready to label text on the device at hand."""

    name: str  # folder or Hub id that it was read from
    model: Classifier
    tokenizer: PreTrainedTokenizerBase
    accelerator: Accelerator | Alone
    label_names: list[str]
    max_length: int
    packed: bool  # layout of the micro-batches
    max_tokens: int
    recipe: Recipe | None  # of the run it came from, where that lies beside it

    @property
    def shapes(self) -> list[Shape] | None:
        """The few that micro-batches have, whatever the texts; None: any."""
        few = has_few_shapes(self.accelerator.device, packed=self.packed)
        return fixed_shapes(self.max_length, self.max_tokens) if few else None

    def logits(self, texts: list[str], pairs: list[str] | None = None) -> Logits:
        """Logits of some texts, or pairs of texts, in their order; shape (texts, num_labels)."""
        tokens = tokens_of_texts(self.tokenizer, [texts] if pairs is None else [texts, pairs], self.max_length)
        while True:
            try:
                with self.accelerator.autocast():  # the precision of the launch; float32 without one
                    return predict_logits(
                        self.accelerator, self.model, tokens, self.max_tokens, packed=self.packed, shapes=self.shapes
                    )
            except OutOfMemory as error:
                if error.examples == 1:
                    raise OutOfMemory(f"{error}: a single text does not fit; use a larger device, or a CPU") from error
                self.max_tokens = smaller_budget(self.max_tokens, error.tokens)


def load_predictor(
    path: str, *, max_tokens_per_device: int | None = None, trust_remote_code: bool = False
) -> Predictor:
    """The model of a run, of a model folder, or of a Hub id, on the device of an Accelerator of its own.

    Raises:
        UserError: there is none.
    """
    return read_model(path, trust_remote_code=trust_remote_code).on(hardware.start_accelerator(), max_tokens_per_device)


@dataclass(frozen=True)
class TrainedModel:
    """What a folder or the Hub holds, on the CPU."""

    name: str  # folder or Hub id
    classifier: Classifier
    tokenizer: PreTrainedTokenizerBase
    label_names: list[str]  # by class id
    recipe: Recipe | None  # of the run it came from, where that lies beside it

    def on(self, accelerator: Accelerator, max_tokens_per_device: int | None = None) -> Predictor:
        """The model on an Accelerator's device. Collective: all processes take the same token budget.

        Raises:
            UserError: the budget is not positive.
        """
        max_length = longest_input(None, self.tokenizer, self.classifier.model.config)
        packed = self.classifier.is_known and packs(accelerator.device)
        needs = prediction_needs(self.classifier, max_length, packed=packed)
        return Predictor(
            name=self.name,
            model=self.classifier.to(accelerator.device).eval(),
            tokenizer=self.tokenizer,
            accelerator=accelerator,
            label_names=self.label_names,
            max_length=max_length,
            packed=packed,
            max_tokens=device_memory.tokens_per_device(accelerator, needs, max_tokens_per_device),
            recipe=self.recipe,
        )


def read_model(path: str, *, trust_remote_code: bool = False) -> TrainedModel:
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
    names = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    twice = next((label for label in names if names.count(label) > 1), None)
    if twice is not None:
        raise UserError(f"{name}: two labels are named {twice!r}; give each a name in `id2label` of its config.json")
    return TrainedModel(name, Classifier(model), tokenizer, names, recipe)


def _means_a_folder(path: str) -> bool:
    """Whether a name is no Hub id, `name` or `owner/name`, or its first part is a folder here."""
    folder = Path(path)
    beside = len(folder.parts) == 2 and folder.parent.is_dir()
    return path.startswith(("/", "./", "../", "~")) or len(folder.parts) > 2 or beside


def predict_texts(predictor: Predictor, texts: list[str], pairs: list[str] | None = None) -> list[dict[str, Any]]:
    """Prediction and probabilities of each text, in order."""
    return predictions(predictor.logits(texts, pairs), predictor.label_names)


def text_columns(
    recipe: Recipe | None, name: str, present: Sequence[str], text: str | None, pair: str | None
) -> list[str]:
    """The column of the text, and that of the second text if there is one.

    Args:
        recipe: whose columns they are where the command line names none.
        name: of the file, for people.
        present: the columns that it has.
        text: `--text_column`.
        pair: `--text_pair_column`.

    Raises:
        DataError: the file has no such column.
    """
    dataset = recipe.dataset if recipe else None
    wanted = [
        text or (dataset.text_column if dataset else "text"),
        pair or (dataset.text_pair_column if dataset else None),
    ]
    columns = [column for column in wanted if column is not None]
    for column, option in zip(columns, ("--text_column", "--text_pair_column"), strict=False):
        if column not in present:
            raise DataError(
                f"{name} has no column {column!r}; it has: {', '.join(present)}; name the column of the text with {option}"
            )
    return columns


@dataclass
class Tally:
    """What was labelled."""

    rows: int = 0
    blank: int = 0
    first_blank: str = ""  # its place
    defused: int = 0  # cells that were marked as text for spreadsheets
    first_defused: str = ""  # its place


@dataclass
class Labelled:
    """What the model makes of some rows."""

    labels: list[str]  # names, by row
    shares: Shares
    blank: list[int]  # rows of the table without any text, whose label means nothing


def label_rows(
    predictor: Predictor, rows: pa.Table, columns: Sequence[str], place: Callable[[int], str], first: int
) -> Labelled:
    """Label some rows, at least one.

    Args:
        predictor: the model.
        rows: some of a table, no more than memory holds.
        columns: of the text, and of the second text if there is one.
        place: names a row of the table for people.
        first: the table's row that these begin with.

    Raises:
        DataError: a cell holds no text.
    """
    texts = [_checked(rows.column(column).to_pylist(), column, place, first) for column in columns]
    blank = [first + i for i, cells in enumerate(zip(*texts, strict=True)) if not all(map(str.strip, cells))]
    shares = probabilities(predictor.logits(*texts))
    return Labelled([predictor.label_names[i] for i in shares.argmax(-1)], shares, blank)


def label_tables(
    predictor: Predictor,
    tables: Iterable[pa.Table],
    columns: Sequence[str],
    place: Callable[[int], str],
    first: int,
    writer: Writer,
    schema: pa.Schema,
    tally: Tally,
) -> int:
    """Label tables that follow each other, and write them.

    Args:
        predictor: the model.
        tables: rows, no more at a time than memory holds, with at least one each.
        columns: of the text, and of the second text if there is one.
        place: names a row for people.
        first: the row that the first table begins with.
        writer: takes the rows.
        schema: of the columns that the writer takes.
        tally: what was labelled is added to it.

    Returns:
        how many rows there were.

    Raises:
        DataError: a cell holds no text.
    """
    start = first
    for rows in tables:
        done = label_rows(predictor, rows, columns, place, first)
        writer.write(rows.select(schema.names).cast(schema), done.labels, done.shares)
        if done.blank:
            tally.first_blank = tally.first_blank or place(done.blank[0])
            tally.blank += len(done.blank)
        first += len(rows)
    tally.rows += first - start
    tally.defused += writer.defused
    if writer.first_defused is not None and not tally.first_defused:
        row, column = writer.first_defused
        tally.first_defused = f"the column name {column!r}" if row < 0 else f"{place(start + row)}, column {column!r}"
    return first - start


def _checked(texts: list[Any], column: str, place: Callable[[int], str], first: int) -> list[str]:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            found = "no text" if text is None else f"{type(text).__name__}, not text"
            raise DataError(f"{place(first + i)}: column {column!r} holds {found}; complete or remove the row")
    return texts


def tell_of_blanks(first: str, count: int) -> None:
    """Warn of rows without text: the place of the first of them, and how many there are."""
    if count:
        logger.warning(
            "%s%s: there is no text, and the label given means nothing; complete or remove such rows",
            *(first, f" and {count - 1} more row{'s' if count > 2 else ''}" if count > 1 else ""),
        )


def tell_of_formulas(where: Path, first: str, count: int) -> None:
    """Warn of cells that were marked as text for spreadsheets: the place of the first of them, and how many there are."""
    if count:
        logger.warning(
            "%s: %d cell%s that a spreadsheet would run as a formula begin%s with an apostrophe%s: %s; --keep_formulas writes "
            "them as they are, and so do .jsonl and .parquet",
            *(where, count, *(("s", "", ", the first") if count > 1 else ("", "s", "")), first),
        )

"""Label text with a trained model, and score it on other data.

    accel-trainer predict RUN_OR_MODEL --text "…"
    accel-trainer predict RUN_OR_MODEL --input reviews.csv --output labelled.csv
    accel-trainer evaluate RUN_OR_MODEL --input other.csv

    accelerate launch --config_file accelerate_configs/multi_gpu.yaml -m accel_trainer.predict RUN_OR_MODEL \\
        --input 'shards/*.parquet' --output labelled/

A file goes through in chunks, so that its size is bounded by the disk and not by memory; within a chunk rows are sorted
by length and put back in order. Many files go through many processes: see `bulk_prediction`.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from accel_trainer import collectives, hardware, metrics, xla
from accel_trainer.bulk_prediction import FORMATS, ROWS_PER_FILE, Options, prepare, work
from accel_trainer.callable_module import make_callable
from accel_trainer.command_line import Parser
from accel_trainer.data import rows_of_role
from accel_trainer.data_file import converted_by_the_user
from accel_trainer.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    AccelTrainerError,
    DataError,
    Interrupted,
    ProcessLost,
    UserError,
)
from accel_trainer.prediction_files import carried_columns, open_writer
from accel_trainer.predictor import (
    ROWS_AT_ONCE,
    Predictor,
    Tally,
    label_tables,
    load_predictor,
    predict_texts,
    tell_of_blanks,
    tell_of_formulas,
    text_columns,
)
from accel_trainer.recipe import DatasetSection, EvaluationSection, SplitsSection
from accel_trainer.redaction import without_secrets
from accel_trainer.signals import ignore_stop_signals, interrupted_by_signals
from accel_trainer.sources import read_files
from accel_trainer.terminal import complain, write_any_text
from accel_trainer.tracking import logger, speak_on

__all__ = ["Predictor", "evaluate_file", "load_predictor", "logger", "predict_file", "predict_texts"]


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
    with converted_by_the_user():
        table = read_files([source])
    present = table.data.column_names
    columns = text_columns(predictor.recipe, table.origins[0].name, present, text_column, text_pair_column)
    carried = carried_columns(present, predictor.label_names)
    whole = table.data.features.arrow_schema
    schema = pa.schema([whole.field(name) for name in carried])
    rows = table.data.with_format("arrow")
    chunks = (rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE))
    tally = Tally()
    with open_writer(target, predictor.label_names, schema, keep_formulas=keep_formulas) as writer:
        count = label_tables(predictor, chunks, columns, table.place, 0, writer, schema, tally)
    tell_of_blanks(tally.first_blank, tally.blank)
    tell_of_formulas(target, tally.first_defused, tally.defused)
    return count


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
    with converted_by_the_user():
        table = read_files([source])
    recipe = predictor.recipe
    dataset = recipe.dataset if recipe else DatasetSection(path=str(source), splits=SplitsSection(train="train"))
    settings = recipe.evaluation if recipe else EvaluationSection()
    present = table.data.column_names
    columns = text_columns(recipe, table.origins[0].name, present, text_column, text_pair_column)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Label many files, from a command line, as one of the processes of a launch.

    Returns:
        the exit code: 0 all files are labelled, 2 the user's mistake, 75 interrupted, 1 anything else.
    """
    arguments = vars(parse_arguments(argv))
    write_any_text()
    # Until the work begins every process meets the same mistakes, and one of them says so.
    is_first = speaks = collectives.is_first_process()
    speak_on(is_first)
    model, options = arguments.pop("model"), Options(**arguments)
    try:
        with interrupted_by_signals(resumable=False):
            job = prepare(model, options)
            speaks = True
            work(job)
    except AccelTrainerError as error:
        if is_first or isinstance(error, ProcessLost) or (speaks and not isinstance(error, Interrupted)):
            complain(error)
        return xla.end_function(error.exit_code)
    except Exception:
        print(without_secrets(traceback.format_exc()), file=sys.stderr, flush=True)
        return xla.end_function(EXIT_FAILED)
    return EXIT_DONE


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # noqa: PTH111 (Path's own raises where there is no home)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of the launched form."""
    parser = Parser(
        prog="accel_trainer.predict",
        description="Label the rows of many files by many processes. A single file: accel-trainer predict.",
        epilog="accelerate launch --config_file accelerate_configs/multi_gpu.yaml -m accel_trainer.predict runs/reviews "
        "--input 'shards/*.parquet' --output labelled",
    )
    add = parser.add_argument
    add("model", metavar="RUN_OR_MODEL", help="folder of a run or of a model, or a Hub id")
    add("--input", nargs="+", required=True, metavar="FILES", help="tables, or patterns such as 'shards/*.parquet'")
    add("--output", type=_path, required=True, metavar="DIR", help="folder for the labelled rows; of no other use")
    add("--text_column", help="column of the text (default: the recipe's)")
    add("--text_pair_column", help="column of the second text (default: the recipe's)")
    add("--format", choices=FORMATS, default="parquet", help="of the labelled files (default: %(default)s)")
    add(
        "--rows_per_file", type=int, default=ROWS_PER_FILE, metavar="N",
        help="rows of a labelled file at most; what a process that is killed loses (default: %(default)s)",
    )  # fmt: skip
    add("--max_tokens_per_device", type=int, metavar="N", help="tokens per micro-batch, padding included")
    add("--keep_formulas", action="store_true", help="write cells that a spreadsheet would run into .csv as they are")
    add(
        "--ddp_timeout", type=int, default=hardware.TIMEOUT, metavar="SECONDS",
        help="how long processes wait at the start for one that does not answer (default: %(default)s)",
    )  # fmt: skip
    add("--trust_remote_code", action="store_true", help="run code that the model's repository holds")
    return parser.parse_args(argv)


make_callable(__name__)  # `from accel_trainer import predict` is a function

if __name__ == "__main__":
    ignore_stop_signals()  # but for what listens to them
    collectives.end_process(main())

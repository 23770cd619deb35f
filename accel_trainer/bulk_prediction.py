"""Label many files by many processes, which may die.

    accelerate launch … -m accel_trainer.predict RUN_OR_MODEL --input 'shards/*.parquet' --output labelled

What is to be done is divided into parts when it begins, and never again: neither the number of processes nor what happens
to them changes which rows stand in which file. A part that is there is complete. Each process takes the parts that are not
there, one after the other, unless another process is at work on them; it ends when all are there. So the processes talk to
each other at the start alone, and the work of one that died is done by the others, or by the next launch of the same line.
Where a machine's locks do not reach the others two may do one part: either's file is complete, and the later one stays.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from accelerate import Accelerator

from accel_trainer import collectives, hardware
from accel_trainer.bulk_files import find_inputs
from accel_trainer.bulk_folder import CLAIMS, LAYOUT, check_output, damage, entered, is_there
from accel_trainer.bulk_inputs import Input, read_inputs
from accel_trainer.claims import Claims
from accel_trainer.errors import DataError, ProcessLost, UserError
from accel_trainer.model_files import pinned_files
from accel_trainer.prediction_files import carried_columns, open_writer
from accel_trainer.predictor import (
    ROWS_AT_ONCE,
    Alone,
    Predictor,
    Tally,
    TrainedModel,
    label_tables,
    read_model,
    tell_of_blanks,
    tell_of_formulas,
    text_columns,
)
from accel_trainer.recipe import ModelSection
from accel_trainer.tracking import heard, logger, quieten_libraries, speak_on
from accel_trainer.writing import sweep_unfinished

FORMATS = ("parquet", "jsonl", "csv")
ROWS_PER_FILE = 20_000  # seconds of work on a GPU, little enough to lose on a CPU
BETWEEN_LINES = 30.0  # seconds between two lines that tell how far it is
PAUSE = 0.5  # seconds between two looks at what other processes are at work on


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    input: Sequence[str]
    output: Path
    text_column: str | None = None
    text_pair_column: str | None = None
    format: str = "parquet"
    rows_per_file: int = ROWS_PER_FILE
    max_tokens_per_device: int | None = None
    keep_formulas: bool = False
    ddp_timeout: int = hardware.TIMEOUT
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Part:
    """Some rows of an input, and the file that they go to."""

    number: int  # among all
    source: Input
    start: int
    stop: int
    target: Path

    @property
    def is_done(self) -> bool:
        """Whether its file is there, and so complete."""
        return self.target.exists()


@dataclass(frozen=True)
class Job:
    """All that is to be done, and this process's way of doing it."""

    predictor: Predictor
    options: Options
    columns: list[str]  # of the text, and of the second text if there is one
    schema: pa.Schema  # of what is carried over from the inputs
    parts: list[Part]  # in the order of their rows
    process: int  # index of this one
    processes: int


# --- before the work --------------------------------------------------------------------------------------------------


def prepare(model: str, options: Options) -> Job:
    """Read the model, and what is to be labelled, and see that the output folder is for that. Collective.

    Args:
        model: folder of a run or of a model, or a Hub id.
        options: the command line's.

    Raises:
        UserError: on every process, if there is a mistake on any.
        ProcessLost: another process died meanwhile.
    """
    accelerator = hardware.start_accelerator(timeout=options.ddp_timeout)
    speak_on(accelerator.is_main_process)
    quieten_libraries()
    with _lost_at_the_start(accelerator):
        with collectives.together(accelerator), collectives.first_process_first(accelerator):
            files = find_inputs(options.input, options.output)
            if options.rows_per_file < 1:
                raise UserError(f"--rows_per_file {options.rows_per_file}: give a number of rows, 1 or more")
            check_output(options.output)
            trained = read_model(model, trust_remote_code=options.trust_remote_code)
            given = options.text_column, options.text_pair_column
            inputs = read_inputs(files, lambda name, present: text_columns(trained.recipe, name, present, *given))
            columns = text_columns(trained.recipe, str(inputs[0].path), inputs[0].schema.names, *given)
            manifest = _manifest(trained, inputs, columns, options, accelerator)
        with entered(options.output, manifest, accelerator):
            predictor = trained.on(accelerator, options.max_tokens_per_device)
        process, processes = accelerator.process_index, accelerator.num_processes
        collectives.leave_process_group(accelerator)
    predictor.accelerator = Alone(accelerator)
    carried = carried_columns(inputs[0].schema.names, predictor.label_names)
    schema = pa.schema([inputs[0].schema.field(name) for name in carried])
    return Job(predictor, options, columns, schema, _parts(inputs, options), process, processes)


@contextmanager
def _lost_at_the_start(accelerator: Accelerator) -> Iterator[None]:
    try:
        with collectives.lost_processes_named(accelerator):
            yield
    except ProcessLost as error:
        raise ProcessLost(
            f"process {accelerator.process_index} of {accelerator.num_processes} lost another one before the work began; run "
            "the same line again"
        ) from error


def _manifest(
    trained: TrainedModel, inputs: Sequence[Input], columns: Sequence[str], options: Options, accelerator: Accelerator
) -> dict[str, Any]:
    """All that the labels and their places depend on, but for rounding."""
    return {
        "layout": LAYOUT,
        "model": pinned_files(ModelSection(checkpoint=trained.name)).sha256 or {},
        "columns": list(columns),
        "format": options.format,
        "rows_per_file": options.rows_per_file,
        "keep_formulas": options.keep_formulas,
        "mixed_precision": accelerator.mixed_precision,
        "inputs": {source.name: source.identity for source in inputs},
    }


def _parts(inputs: Sequence[Input], options: Options) -> list[Part]:
    parts: list[Part] = []
    for source in inputs:
        bounds = source.parts(options.rows_per_file)
        digits = max(5, len(str(len(bounds) - 1)))  # all of a file's alike, so that they sort
        for i, (start, stop) in enumerate(bounds):
            target = options.output / source.name / f"part-{i:0{digits}}.{options.format}"
            parts.append(Part(len(parts), source, start, stop, target))
    return parts


# --- the work ---------------------------------------------------------------------------------------------------------


def work(job: Job) -> None:
    """Label what is not labelled yet and what no other process is at work on; return when all of it is there.

    Without locks: when this process's share is there.

    Raises:
        UserError: the data of a part, or the disk.
        OutOfMemory: a single text does not fit into memory.
    """
    try:
        _work(job)
    except OSError as error:  # of what all share: the folders, and the locks
        raise UserError(
            f"--output {error.filename or job.options.output}: {error.strerror or error}; see to the disk, and run the same line "
            "again"
        ) from error


def _work(job: Job) -> None:
    output, parts = job.options.output, job.parts
    is_first = job.process == 0
    _remove_damaged(job)
    done = sum(part.is_done for part in parts)
    rows = sum(part.stop - part.start for part in parts)
    all_rows, files = (f"{n} {what}{'' if n == 1 else 's'}" for n, what in ((rows, "row"), (len(parts), "file")))
    if is_first:
        logger.info("%s: %s in %s, %d of them there already", output, all_rows, files, done)
    folders = [output, *dict.fromkeys(part.target.parent for part in parts)]
    sweep_unfinished(*folders)
    claims = Claims(output / CLAIMS)
    tally, started, told = Tally(), time.perf_counter(), time.perf_counter()
    try:
        for part in _in_turn(job, keeps_claims=claims.are_kept):
            with claims.claimed(part.number) as mine:
                if mine and not is_there(part.target):
                    _label(job, part, tally)
            if is_first and time.perf_counter() - told > BETWEEN_LINES:
                told = time.perf_counter()
                done = sum(part.is_done for part in parts)
                logger.info("%d of %s; %.0f rows/s here%s", done, files, tally.rows / (told - started),
                            "" if mine else f"; another process is at work on {part.target}")  # fmt: skip
    finally:
        claims.close()
        with heard():
            tell_of_blanks(tally.first_blank, tally.blank)
            tell_of_formulas(output, tally.first_defused, tally.defused)
    sweep_unfinished(*folders)  # of those that died meanwhile
    if is_first:
        done = sum(part.is_done for part in parts)
        rest = f"{done} of {files}; the other processes do the rest"
        print(f"{output}: {rest if done < len(parts) else all_rows}", flush=True)


def _remove_damaged(job: Job) -> None:
    """Remove what is no longer as it was finished, of this process's share, so that it is done again."""
    for part in _share(job):
        with suppress(FileNotFoundError), heard():
            if what := damage(part.target, part.stop - part.start):
                logger.warning("%s: it is damaged (%s); its rows are labelled again", part.target, what)
                part.target.unlink()


def _share(job: Job) -> list[Part]:
    """The parts that would be this process's if they were dealt out."""
    return [part for part in job.parts if part.number % job.processes == job.process]


def _in_turn(job: Job, *, keeps_claims: bool) -> Iterator[Part]:
    """The parts that are not there, as this process is to try them; the same again and again until they are.

    First those that would be its own if they were dealt out, so that processes seldom meet; then those of the others; in the
    end it comes back to what others are at work on, who may die. Without claims it keeps to its own.
    """

    def own_first(part: Part) -> tuple[int, int]:
        return (part.number - job.process) % job.processes, part.number

    left = sorted(job.parts, key=own_first)
    if not keeps_claims:
        logger.warning("note: %s cannot be locked; no two launches may use it at once", job.options.output)
        left = _share(job)
    pause = 0.0
    while left := [part for part in left if not part.is_done]:
        for part in left:
            if not part.is_done:
                time.sleep(pause)
                yield part
        pause = PAUSE


def _label(job: Job, part: Part, tally: Tally) -> None:
    """Label a part; its file appears when it is complete."""
    try:
        _write(job, part, tally)
    except UserError as error:
        # The unfinished file is gone and the finished one there, as when a network's file system does one rename twice.
        if not (isinstance(error.__cause__, FileNotFoundError) and part.is_done):
            raise


def _write(job: Job, part: Part, tally: Tally) -> None:
    names, source, planned = job.predictor.label_names, part.source, part.stop - part.start
    with open_writer(part.target, names, job.schema, keep_formulas=job.options.keep_formulas) as writer:
        tables = source.tables(part.start, part.stop, ROWS_AT_ONCE)
        rows = label_tables(job.predictor, tables, job.columns, source.place, part.start, writer, job.schema, tally)
        if rows != planned:
            raise DataError(f"{source.path}: it has {rows} rows where {planned} should be; write the file again")

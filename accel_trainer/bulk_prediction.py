"""Label many files by many processes, which may die.

    accelerate launch … -m accel_trainer.predict RUN_OR_MODEL --input 'shards/*.parquet' --output labelled

    labelled/shard-7/part-00000.parquet     the first rows of shards/shard-7.parquet, in order, labelled
    labelled/.manifest.json                 the model, the options and the inputs that the folder is for
    labelled/.claims                        who is at work on which part

What is to be done is divided into parts when it begins, and never again: neither the number of processes nor what happens
to them changes which rows stand in which file. A part that is there is complete. Each process takes the parts that are not
there, one after the other, unless another process is at work on them; it ends when all are there. So the processes talk to
each other at the start alone, and the work of one that died is done by the others, or by the next launch of the same line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from accelerate import Accelerator

from accel_trainer import hardware
from accel_trainer.bulk_inputs import Input, find_inputs, read_inputs
from accel_trainer.claims import Claims
from accel_trainer.differences import differences
from accel_trainer.errors import DataError, ProcessLost, RunFolderError, UserError
from accel_trainer.file_names import is_data_file
from accel_trainer.model_files import pinned_files
from accel_trainer.prediction_files import carried_columns, open_writer
from accel_trainer.predictor import (
    ROWS_AT_ONCE,
    Alone,
    Predictor,
    TrainedModel,
    label_rows,
    read_model,
    tell_of_blanks,
    tell_of_formulas,
    text_columns,
)
from accel_trainer.recipe import ModelSection
from accel_trainer.tracking import logger, quieten_libraries, speak_on
from accel_trainer.writing import replaced

FORMATS = ("parquet", "jsonl", "csv")
ROWS_PER_FILE = 20_000  # seconds of work on a GPU, little enough to lose on a CPU
BETWEEN_LINES = 30.0  # seconds between two lines that tell how far it is
LAYOUT = 1  # of the output folder; raised when its files change
MANIFEST, CLAIMS = ".manifest.json", ".claims"  # hidden, so that who reads the folder as a table does not read them


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
        with hardware.together(accelerator), hardware.first_process_first(accelerator):
            files = find_inputs(options.input, options.output)
            _check_output(options)
            trained = read_model(model, trust_remote_code=options.trust_remote_code)
            given = options.text_column, options.text_pair_column
            inputs = read_inputs(files, lambda name, present: text_columns(trained.recipe, name, present, *given))
            columns = text_columns(trained.recipe, str(inputs[0].path), inputs[0].schema.names, *given)
            _enter(options.output, _manifest(trained, inputs, columns, options, accelerator), accelerator)
        predictor = trained.on(accelerator, options.max_tokens_per_device)
        process, processes = accelerator.process_index, accelerator.num_processes
        hardware.leave_process_group(accelerator)
    predictor.accelerator = Alone(accelerator)
    carried = carried_columns(inputs[0].schema.names, predictor.label_names)
    schema = pa.schema([inputs[0].schema.field(name) for name in carried])
    return Job(predictor, options, columns, schema, _parts(inputs, options), process, processes)


@contextmanager
def _lost_at_the_start(accelerator: Accelerator) -> Iterator[None]:
    try:
        with hardware.lost_processes_named(accelerator):
            yield
    except ProcessLost as error:
        raise ProcessLost(
            f"process {accelerator.process_index} of {accelerator.num_processes} lost another one before the work began; run "
            "the same line again"
        ) from error


def _check_output(options: Options) -> None:
    """See that the output can be the folder of this job.

    Raises:
        UserError: it cannot.
    """
    output = options.output
    if options.rows_per_file < 1:
        raise UserError(f"--rows_per_file {options.rows_per_file}: give a number of rows, 1 or more")
    if is_data_file(output.name) and not output.is_dir():
        raise UserError(
            f"--output {output}: this form writes a folder; name one. A single file is labelled by accel-trainer predict"
        )
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: it is a file; name a folder")
    if output.is_dir() and not (output / MANIFEST).exists():
        others = sorted(
            entry.name for entry in output.iterdir() if not entry.name.startswith((MANIFEST, CLAIMS, f".{MANIFEST}"))
        )
        if others:
            raise RunFolderError(
                f"--output {output}: there is something else in it, such as {others[0]}; name a new folder, or an empty one"
            )


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


def _enter(output: Path, manifest: dict[str, Any], accelerator: Accelerator) -> None:
    """Make the output folder this job's, or see that it is.

    Raises:
        RunFolderError: it is another job's, or cannot be written, or is not the same on all machines.
    """
    path = output / MANIFEST
    try:
        if accelerator.is_main_process and not path.exists():
            with replaced(path) as writing:
                writing.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        found = json.loads(path.read_text(encoding="utf-8"))
        Claims(output / CLAIMS).close()
    except FileNotFoundError:
        raise RunFolderError(
            f"--output {output}: process {accelerator.process_index} does not see what process 0 wrote there; name a folder that all "
            "machines share"
        ) from None
    except OSError as error:
        raise RunFolderError(
            f"--output {output}: {error.strerror or error}; name a folder that you may write"
        ) from error
    except ValueError as error:
        raise RunFolderError(
            f"--output {path}: it is damaged ({error}); name another folder, or delete this one"
        ) from error
    changed = [key for key, _, _ in differences(found, manifest)]
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise RunFolderError(
            f"--output {output}: what is labelled there was begun with other values of {', '.join(changed[:5])}{more} (see "
            f"{path}); give the same, name another folder, or delete this one"
        )


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


@dataclass
class _Tally:
    """What this process did."""

    rows: int = 0
    blank: int = 0
    first_blank: str = ""  # its place
    defused: int = 0


def work(job: Job) -> None:
    """Label what is not labelled yet and what no other process is at work on; return when all of it is there.

    Raises:
        UserError: the data of a part, or the disk.
        OutOfMemory: a single text does not fit into memory.
    """
    output, parts = job.options.output, job.parts
    is_first = job.process == 0
    done = sum(part.is_done for part in parts)
    rows = sum(part.stop - part.start for part in parts)
    if is_first:
        logger.info("%s: %d rows in %d files, %d of them there already", output, rows, len(parts), done)
    claims = Claims(output / CLAIMS)
    tally, started, told = _Tally(), time.perf_counter(), time.perf_counter()
    try:
        for part, wait in _in_turn(job, keeps_claims=claims.are_kept):
            if part.is_done:
                continue
            with claims.claimed(part.number, wait=wait) as mine:
                if mine and not part.is_done:
                    _label(job, part, tally)
            if is_first and time.perf_counter() - told > BETWEEN_LINES:
                told = time.perf_counter()
                done = sum(part.is_done for part in parts)
                logger.info("%d of %d files; %.0f rows/s here", done, len(parts), tally.rows / (told - started))
    finally:
        claims.close()
        # Each process tells of its own rows.
        logger.setLevel("INFO" if is_first else "WARNING")
        tell_of_blanks(tally.first_blank, tally.blank)
        tell_of_formulas(output, tally.defused)
    if is_first:
        print(f"{output}: {rows} rows", flush=True)


def _in_turn(job: Job, *, keeps_claims: bool) -> Iterator[tuple[Part, bool]]:
    """The parts as this process is to try them, and whether to wait for who is at work on one.

    First those that would be its own if they were dealt out, so that processes seldom meet; then those of the others; in the
    end it waits for what others are at work on, who may die. Without claims it keeps to its own.
    """

    def own_first(part: Part) -> tuple[int, int]:
        return (part.number - job.process) % job.processes, part.number

    parts = sorted(job.parts, key=own_first)
    if not keeps_claims:
        logger.warning("note: %s cannot be locked; no two launches may use it at once", job.options.output)
        parts = [part for part in parts if part.number % job.processes == job.process]
    for wait in (False, True):
        for part in parts:
            yield part, wait


def _label(job: Job, part: Part, tally: _Tally) -> None:
    """Label a part; its file appears when it is complete."""
    for leftover in part.target.parent.glob(f".{part.target.name}.*.writing"):
        leftover.unlink(missing_ok=True)  # of a process that died at it
    names, options = job.predictor.label_names, job.options
    with open_writer(part.target, names, job.schema, keep_formulas=options.keep_formulas) as writer:
        first = part.start
        for rows in part.source.tables(part.start, part.stop, ROWS_AT_ONCE):
            done = label_rows(job.predictor, rows, job.columns, part.source.place, first)
            writer.write(rows.select(job.schema.names), done.labels, done.shares)
            if done.blank:
                tally.first_blank = tally.first_blank or part.source.place(done.blank[0])
                tally.blank += len(done.blank)
            first += len(rows)
        if first != part.stop:
            raise DataError(f"{part.source.path}: it has {first - part.start} rows where {part.stop - part.start} should be; "
                            "write the file again")  # fmt: skip
    tally.rows += part.stop - part.start
    tally.defused += writer.defused

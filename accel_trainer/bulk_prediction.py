"""Label many files by many processes, which may die.

    accelerate launch … -m accel_trainer.predict RUN_OR_MODEL --input 'shards/*.parquet' --output labelled

    labelled/shard-7/part-00000.parquet     the first rows of shards/shard-7.parquet, in order, labelled
    labelled/.manifest.json                 the model, the options and the inputs that the folder is for
    labelled/.claims                        who is at work on which part

What is to be done is divided into parts when it begins, and never again: neither the number of processes nor what happens
to them changes which rows stand in which file. A part that is there is complete. Each process takes the parts that are not
there, one after the other, unless another process is at work on them; it ends when all are there. So the processes talk to
each other at the start alone, and the work of one that died is done by the others, or by the next launch of the same line.
Where a machine's locks do not reach the others two may do one part: either's file is complete, and the later one stays.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
from accel_trainer.writing import created, sweep_unfinished

FORMATS = ("parquet", "jsonl", "csv")
ROWS_PER_FILE = 20_000  # seconds of work on a GPU, little enough to lose on a CPU
BETWEEN_LINES = 30.0  # seconds between two lines that tell how far it is
PAUSE = 0.5  # seconds between two looks at what other processes are at work on
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
            manifest = _manifest(trained, inputs, columns, options, accelerator)
        _enter(options.output, manifest, accelerator)
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
    if output.is_dir():
        others = sorted(
            entry.name for entry in output.iterdir() if not entry.name.startswith((MANIFEST, CLAIMS, f".{MANIFEST}"))
        )
        # Asked for after them, because it is there before them: another launch may be about to begin.
        if others and not (output / MANIFEST).exists():
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
    """Make the output folder this job's, or see that it is. Collective.

    Raises:
        RunFolderError: it is another job's, or cannot be written, or is not the same on all machines.
    """
    # Not the manifest but a name that nobody has asked for yet: see `_is_there`.
    mark = output / f".{hardware.from_main_process(accelerator, uuid.uuid4().hex)}.writing"
    try:
        with hardware.together(accelerator), _writable(output):
            if accelerator.is_main_process:
                _claim_folder(output, manifest)
                mark.touch()
        first = hardware.from_main_process(accelerator, manifest)
        with hardware.together(accelerator), _writable(output):
            if not _is_there(mark):
                raise RunFolderError(
                    f"--output {output}: what process 0 wrote there is not to be seen here; name a folder that all machines share"
                )
            if changed := _changed(first, manifest):
                raise RunFolderError(
                    f"--output {output}: process 0 began with other values of {changed}; give all machines the same files and options"
                )
            Claims(output / CLAIMS).close()
    finally:
        if accelerator.is_main_process:
            with suppress(OSError):
                mark.unlink()


def _is_there(path: Path) -> bool:
    """Whether a file is there, though another machine may just have written it.

    A network's file system may go on for a while saying that there is no such name, until the folder is opened anew.
    """
    for folder in reversed(path.parents):
        with suppress(OSError):
            os.scandir(folder).close()
    return path.exists()


@contextmanager
def _writable(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"--output {output}: {error.strerror or error}; name a folder that you may write"
        ) from error


def _claim_folder(output: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, or see that the one that is there says the same."""
    path = output / MANIFEST
    if not path.exists():
        with suppress(FileExistsError), created(path) as writing:  # by another launch: then it counts
            writing.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise RunFolderError(
            f"--output {path}: it is damaged ({error}); name another folder, or delete this one"
        ) from error
    if changed := _changed(found, manifest):
        raise RunFolderError(
            f"--output {output}: what is labelled there was begun with other values of {changed} (see {path}); give the same, "
            "name another folder, or delete this one"
        )


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first keys whose values differ, in words; empty if none does."""
    changed = [key for key, _, _ in differences(before, now)]
    more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    return ", ".join(changed[:5]) + more


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

    Without locks: when this process's share is there.

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
    folders = [output, *dict.fromkeys(part.target.parent for part in parts)]
    sweep_unfinished(*folders)
    claims = Claims(output / CLAIMS)
    tally, started, told = _Tally(), time.perf_counter(), time.perf_counter()
    try:
        for part in _in_turn(job, keeps_claims=claims.are_kept):
            with claims.claimed(part.number) as mine:
                if mine and not _is_there(part.target):
                    _label(job, part, tally)
            if is_first and time.perf_counter() - told > BETWEEN_LINES:
                told = time.perf_counter()
                done = sum(part.is_done for part in parts)
                logger.info("%d of %d files; %.0f rows/s here%s", done, len(parts), tally.rows / (told - started),
                            "" if mine else f"; another process is at work on {part.target}")  # fmt: skip
    finally:
        claims.close()
        # Each process tells of its own rows.
        logger.setLevel("INFO" if is_first else "WARNING")
        tell_of_blanks(tally.first_blank, tally.blank)
        tell_of_formulas(output, tally.defused)
    sweep_unfinished(*folders)  # of those that died meanwhile
    if is_first:
        done = sum(part.is_done for part in parts)
        rest = f"{done} of {len(parts)} files; the other processes do the rest"
        print(f"{output}: {rest if done < len(parts) else f'{rows} rows'}", flush=True)


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
        left = [part for part in left if part.number % job.processes == job.process]
    pause = 0.0
    while left := [part for part in left if not part.is_done]:
        for part in left:
            if not part.is_done:
                time.sleep(pause)
                yield part
        pause = PAUSE


def _label(job: Job, part: Part, tally: _Tally) -> None:
    """Label a part; its file appears when it is complete."""
    try:
        _write(job, part, tally)
    except UserError as error:
        # The unfinished file is gone and the finished one there, as when a network's file system does one rename twice.
        if not (isinstance(error.__cause__, FileNotFoundError) and part.is_done):
            raise


def _write(job: Job, part: Part, tally: _Tally) -> None:
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

"""The folder that many processes label into: what it is for, whose it is, and which of its parts are whole.

A part, `labelled/shard-7/part-00000.parquet`, holds the first rows of `shards/shard-7.parquet`, in order, labelled. Beside
them the manifest says which model, options and inputs the folder is for, and a file of locks who is at work on which part.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator

from accel_trainer import collectives
from accel_trainer.claims import Claims
from accel_trainer.differences import differences, short
from accel_trainer.errors import RunFolderError, UserError
from accel_trainer.file_names import is_data_file
from accel_trainer.writing import created

LAYOUT = 2  # of the folder; raised when its files change
MANIFEST, CLAIMS = ".manifest.json", ".claims"  # hidden, so that who reads the folder as a table does not read them
MOST_DIFFERENCES = 5  # that are told
# Keys of the manifest, as people know them.
_SHOWN = {
    "columns": "the column of the text",
    "format": "--format",
    "rows_per_file": "--rows_per_file",
    "keep_formulas": "--keep_formulas",
    "mixed_precision": "mixed_precision of the accelerate config",
}


def check_output(output: Path) -> None:
    """See that a path can be the folder of a job.

    Raises:
        UserError: it cannot.
    """
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


@contextmanager
def entered(output: Path, manifest: dict[str, Any], accelerator: Accelerator) -> Iterator[None]:
    """Make the folder this job's, or see that it is, for what else is to be done before the work. Collective.

    What was made is gone again if a mistake shows here or in the block.

    Raises:
        RunFolderError: it is another job's, or cannot be written, or is not the same on all machines.
    """
    # Not the manifest but a name that nobody has asked for yet: see `is_there`.
    mark = output / f".{collectives.from_main_process(accelerator, uuid.uuid4().hex)}.writing"
    is_first = accelerator.is_main_process
    made: list[Path] = []
    try:
        with collectives.together(accelerator), _writable(output):
            if is_first:
                _claim(output, manifest, made)
                mark.touch()
        first = collectives.from_main_process(accelerator, manifest)
        with collectives.together(accelerator), _writable(output):
            if not is_there(mark):
                raise RunFolderError(
                    f"--output {output}: what process 0 wrote there is not to be seen here; name a folder that all machines share"
                )
            if changed := _changed(first, manifest, "on process 0"):
                raise RunFolderError(
                    f"--output {output}: {_told(changed)}; give all machines the same files and options"
                )
            Claims(output / CLAIMS).close()
        yield
    except UserError:
        if is_first:
            with suppress(OSError):
                _unmake(output, [mark, *made])
        raise
    finally:
        if is_first:
            with suppress(OSError):
                mark.unlink(missing_ok=True)


def _unmake(output: Path, made: list[Path]) -> None:
    """Remove what was made, unless something else is in the folder, as of a launch that joined in."""
    if set(output.iterdir()) <= set(made):
        for path in made:
            if path != output:
                path.unlink(missing_ok=True)
        if output in made:
            output.rmdir()


def is_there(path: Path) -> bool:
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


def _claim(output: Path, manifest: dict[str, Any], made: list[Path]) -> None:
    """Write the manifest, or see that the one that is there says the same; `made` gets what was not there before."""
    path = output / MANIFEST
    if not path.exists():
        made += [] if output.exists() else [output]
        with suppress(FileExistsError):  # by another launch: then it counts
            with created(path) as writing:
                writing.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            made += [path, output / CLAIMS]
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise RunFolderError(
            f"--output {path}: it is damaged ({error}); name another folder, or delete this one"
        ) from error
    changed = _changed(found, manifest, "when the folder was begun")
    if not changed:
        return
    remedy = f"give the same (see {path}), name another folder, or delete this one"
    if "new" in changed.values() and set(changed.values()) <= {"new", "renamed"}:
        remedy = "label new files alone, into a folder of their own, or name a folder for all"
    raise RunFolderError(f"--output {output}: {_told(changed)}; {remedy}")


def _changed(before: dict[str, Any], now: dict[str, Any], when: str) -> dict[str, str]:
    """What differs between two manifests, in words, each with what kind of difference it is."""
    if before.get("layout") != now["layout"]:
        return {f"another version of accel_trainer was at work {when}": "option"}
    old, new = (_inputs(manifest) for manifest in (before, now))
    words: dict[str, str] = {}
    for key, was, value in differences({**before, "inputs": {}}, {**now, "inputs": {}}):
        section, _, name = key.partition(".")
        if section == "model":
            words[f"the model's {name or 'files'} {'is' if name else 'are'} not what it was {when}"] = "option"
        else:
            words[f"{_SHOWN.get(key, key)} is {short(value)}, and was {short(was)} {when}"] = "option"
    names = {source.get("path"): name for name, source in old.items()}
    for name, source in new.items():
        path = source["path"]
        if names.get(path, name) != name:
            words[f"{path} would go to {name}/, and went to {names[path]}/ {when}"] = "renamed"
        elif name not in old:
            words[f"{path} was not among the inputs {when}"] = "new"
        elif any(old[name].get(key) != source[key] for key in ("bytes", "rows", "content")):
            words[f"{path} is not the file that it was {when}"] = "changed"
    paths = {source["path"] for source in new.values()}
    for name, source in old.items():
        if name not in new and source.get("path") not in paths:
            words[f"{source.get('path', name)} was among the inputs {when}, and is not now"] = "missing"
    return words


def _inputs(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    inputs = manifest.get("inputs")
    named = inputs.items() if isinstance(inputs, dict) else ()
    return {name: source for name, source in named if isinstance(source, dict)}


def _told(changed: dict[str, str]) -> str:
    more = f", and {len(changed) - MOST_DIFFERENCES} more" if len(changed) > MOST_DIFFERENCES else ""
    return ", ".join(list(changed)[:MOST_DIFFERENCES]) + more


# --- its parts --------------------------------------------------------------------------------------------------------


def damage(path: Path, rows: int) -> str | None:
    """What is wrong with a part that was finished, as far as that is known without reading all of it; None if nothing is.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    if path.suffix == ".parquet":
        try:
            found = pq.read_metadata(path).num_rows
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            return str(error)
        return None if found == rows else f"it has {found} rows where {rows} should be"
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            return "it is empty" if rows or path.suffix != ".jsonl" else None
        file.seek(-1, os.SEEK_END)
        return None if file.read() == b"\n" else "it is cut off"

"""Files and folders that appear whole or not at all.

They are written beside their place, flushed to disk and renamed. A folder also gets a manifest of its files, so that
damage done later is recognised before anything in it is used. What a killed process leaves has a name of its own,
hidden, which `sweep` knows:

    .NAME.writing  .NAME.MACHINE-PID-WORD.writing   unfinished
    .NAME.old                                       the folder NAME, while another takes its place
    .NAME.deleted                                   a folder on its way out
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path, PurePath

from safetensors import SafetensorError, safe_open

from accel_trainer.errors import RunFolderError

MANIFEST = "manifest.json"


_UNFINISHED = re.compile(r"\.([0-9a-f]{8})-([0-9]{1,9})-[0-9a-f]{8}\.writing")
_DAY = 86_400.0  # seconds; nobody writes one file for so long
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # of a file system


@contextmanager
def replaced(final: Path) -> Iterator[Path]:
    """A path to write a file to, which takes the place of `final` when the block ends, whole, or not at all.

    Raises:
        OSError: the file cannot be written; `final` stays as it was.
    """
    with _beside(final) as temporary:
        yield temporary
        _flush(temporary)
        temporary.replace(final)
        _flush(final.parent)


@contextmanager
def created(final: Path) -> Iterator[Path]:
    """As `replaced`, for a file that is new: of all who want to make it, one does.

    Raises:
        FileExistsError: it is there by now.
        OSError: it cannot be written.
    """
    with _beside(final) as temporary:
        yield temporary
        _flush(temporary)
        try:
            os.link(temporary, final)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            final.touch(exist_ok=False)  # the name is taken; the content follows at once
            try:
                temporary.replace(final)
            except BaseException:
                final.unlink(missing_ok=True)
                raise
        _flush(final.parent)


@contextmanager
def _beside(final: Path) -> Iterator[Path]:
    """A path beside `final`, where a file may be written; it is gone when the block ends."""
    # Another process may be writing it too: on another machine, or in a container whose processes have the same numbers.
    word = f"{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary = final.with_name(f".{final.name}.{word}.writing")
    try:
        _make(final.parent)
        yield temporary
    finally:
        with suppress(OSError):  # as a file where a folder should be; the block's own error says so
            temporary.unlink(missing_ok=True)


@cache
def _machine() -> str:
    """A word for all processes that know each other by their numbers: of one start of one machine, and of one container."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii") + str(
            Path("/proc/self/ns/pid").readlink()
        )
    except OSError:  # another system than Linux
        name = platform.node()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def sweep_unfinished(*folders: Path) -> None:
    """Remove the files of some folders that nobody will finish. Unlike with `sweep`, others may be writing there.

    Those are the files of processes of this machine that died; of other machines nothing is known, so that theirs are left for
    a day.
    """
    for folder in folders:
        for path in folder.glob(".*.writing"):
            found = _UNFINISHED.search(path.name)
            died = found is not None and found[1] == _machine() and _is_dead(int(found[2]))
            with suppress(OSError):  # it is gone
                if died or time.time() - path.stat().st_mtime > _DAY:
                    path.unlink()


def _is_dead(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks only
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        pass
    return False


@contextmanager
def committed(final: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `final` when the block ends, whole, or not at all.

    No system renames a folder over a full one, so that for a moment between two renames neither has the name; `sweep` puts
    the old one back if the process dies then.

    Raises:
        RunFolderError: there is no space, or no permission to write; `final` stays as it was.
    """
    temporary, aside = final.with_name(f".{final.name}.writing"), _aside(final)
    try:
        restore_interrupted(final)  # what lies aside may be all there is: not to be deleted below
        shutil.rmtree(temporary, ignore_errors=True)
        _make(final.parent)
        temporary.mkdir()
        yield temporary
        _seal(temporary)
        shutil.rmtree(aside, ignore_errors=True)
        if final.exists():
            final.rename(aside)
        temporary.rename(final)
        _flush(final.parent)
    except Exception as error:
        reason = _of_the_disk(error)
        if reason is None:
            raise
        raise RunFolderError(
            f"cannot write {final}: {reason}; what was saved before is kept. Make space or choose another --output_dir, then "
            "continue with --resume"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # the next start tries again
            restore_interrupted(final)
    remove(aside)


def _of_the_disk(error: Exception) -> str | None:
    """What the disk said; None if the error is about something else."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError) or re.search(r"\(os error \d+\)", str(error)):
        return str(error)  # libraries in Rust wrap it, the tokenizers' in a bare Exception
    return None


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def restore_interrupted(final: Path) -> None:
    """Put back what a process that died between `committed`'s two renames had laid aside."""
    if _aside(final).exists() and not final.exists():
        _aside(final).rename(final)


def remove(folder: Path) -> None:
    """Delete a folder, if it can be; it loses its name at once, so that nobody meets half of it."""
    if not folder.exists():
        return
    doomed = folder.with_name(f".{folder.name.removeprefix('.')}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    with suppress(OSError):
        folder = folder.rename(doomed)
    shutil.rmtree(folder, ignore_errors=True)


def sweep(*folders: Path) -> None:
    """Put back or remove what killed processes left in some folders. No other process may be writing there.

    Raises:
        RunFolderError: the complete folder that was laid aside cannot be put back.
    """
    for folder in folders:
        for aside in folder.glob(".*.old"):
            final = folder / aside.name.removeprefix(".").removesuffix(".old")
            try:
                restore_interrupted(final)
            except OSError as error:
                raise RunFolderError(
                    f"cannot rename {aside} to {final.name}: {error.strerror}; do it by hand"
                ) from error
            if aside.is_dir():
                remove(aside)
        for path in [*folder.glob(".*.writing"), *folder.glob(".*.deleted")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


def _make(folder: Path) -> None:
    """Make a folder and those above it, so that they outlast a power cut as what is written into them does."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        _flush(folder.parent)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Force a file, or the names in a folder, to disk; where a folder cannot be flushed, the rename must do."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _seal(folder: Path) -> None:
    """Write the manifest and flush everything. Files are read back: what counts is what others will read."""
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file()]
    with ThreadPoolExecutor() as pool:  # neither hashing nor flushing holds the interpreter's lock
        flushed, digests = pool.map(_flush, files), list(pool.map(sha256, files))
        list(flushed)  # raises what was raised there
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    (folder / MANIFEST).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    mode = (folder / MANIFEST).stat().st_mode
    for path in files:
        with suppress(OSError):  # safetensors makes its files for the owner alone
            path.chmod(mode)
    for path in [folder / MANIFEST, *(path for path in paths if path.is_dir()), folder]:
        _flush(path)


def damage(folder: Path, needed: Sequence[str] = ()) -> str | None:
    """What is wrong with a committed folder, found before anything of it is used; None if it is sound.

    Files that the manifest does not name are nobody's: they are no damage, and are never opened.

    Args:
        folder: as `committed` left it, perhaps.
        needed: files that the manifest must name; those of tensors must open as such.
    """
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not entries.items():
            return f"{MANIFEST} names no files"
        for name in needed:
            if name not in entries:
                return f"{MANIFEST} does not name {name}"
        for name, entry in entries.items():
            if not name.isprintable() or PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                return f"{MANIFEST} names {name!r:.100}, which is no file of this folder"
            path = folder / name
            if not path.is_file():
                return f"{name:.100} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']!r:.20}"
            if sha256(path) != entry["sha256"]:
                return f"{name} has other contents than its manifest says"
            if name in needed and path.suffix == ".safetensors" and not _opens(path):
                return f"{name} is no safetensors file"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def _opens(path: Path) -> bool:
    """Whether a file begins with a header of safetensors that fits its size; no tensor is read."""
    try:
        with safe_open(path, framework="numpy"):
            return True
    except SafetensorError:
        return False

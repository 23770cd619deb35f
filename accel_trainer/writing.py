"""Files and folders that appear whole or not at all.

They are written beside their place, flushed to disk and renamed. A folder also gets a manifest of its files, so that
damage done later is recognised before anything in it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from accel_trainer.errors import RunFolderError

MANIFEST = "manifest.json"


@contextmanager
def replaced(final: Path) -> Iterator[Path]:
    """A path to write a file to, which takes the place of `final` when the block ends, whole, or not at all.

    Raises:
        OSError: the file cannot be written; `final` stays as it was.
    """
    temporary = final.with_name(f".{final.name}.{os.getpid()}.writing")  # another process may be writing it too
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(final)
    finally:
        with suppress(OSError):  # as a file where a folder should be; the block's own error says so
            temporary.unlink(missing_ok=True)


@contextmanager
def committed(final: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `final` when the block ends, whole, or not at all.

    Raises:
        RunFolderError: there is no space, or no permission to write; `final` stays as it was.
    """
    temporary, aside = final.with_name(f".{final.name}.writing"), final.with_name(f".{final.name}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        _write_manifest(temporary)
        shutil.rmtree(aside, ignore_errors=True)
        if final.exists():
            final.rename(aside)
        temporary.rename(final)
        _flush(final.parent)
    except (OSError, SafetensorError) as error:  # safetensors wraps what the disk says
        raise RunFolderError(
            f"cannot write {final}: {getattr(error, 'strerror', None) or error}; what was saved before is kept. Make space or choose another "
            "--output_dir, then continue with --resume"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # the next start tries again
            restore_interrupted(final)
    shutil.rmtree(aside, ignore_errors=True)


def restore_interrupted(final: Path) -> None:
    """Put back what a process that died between `committed`'s two renames had laid aside."""
    aside = final.with_name(f".{final.name}.old")
    if aside.exists() and not final.exists():
        aside.rename(final)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Force a file, or the names in a folder, to disk; where the platform cannot open folders, the rename must do."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    (folder / MANIFEST).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    for path in [*files, folder / MANIFEST, folder]:
        _flush(path)


def damage(folder: Path) -> str | None:
    """What is wrong with a committed folder, found before anything of it is used; None if it is sound."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not entries.items():
            return f"{MANIFEST} names no files"
        for name, entry in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if _sha256(path) != entry["sha256"]:
                return f"{name} has other contents than its manifest says"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None

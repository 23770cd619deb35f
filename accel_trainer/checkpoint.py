"""Folders that exist only when complete, and the checkpoints made of them.

    checkpoints/checkpoint-250/
      model.safetensors        weights by name
      optimizer.safetensors    optimizer state, "<parameter> <entry>" → tensor
      trainer_state.json       step, schedule, scaler, best metric, what the run was started with
      manifest.json            size and SHA-256 of every file above

A folder is written beside its place, hashed, flushed to disk and renamed; older ones go afterwards. Tensors are
safetensors, the rest is JSON: nothing is ever unpickled. No random state is stored, because none is needed: the order of
the examples and the dropout masks are functions of the step.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from accel_trainer.errors import RunFolderError

MANIFEST = "manifest.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


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
    except OSError as error:
        raise RunFolderError(
            f"cannot write {final}: {error.strerror or error}; what was saved before is kept. Make space or choose another "
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


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and paths of the checkpoints under `folder`, oldest first, sound or not."""
    if not folder.is_dir():
        return []
    matches = ((_CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def newest_sound(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, None if there is none; and what is wrong with the newer ones."""
    complaints: list[str] = []
    for _, path in reversed(checkpoints(folder)):
        reason = damage(path)
        if reason is None:
            return path, complaints
        complaints.append(f"{path} is damaged: {reason}; an older checkpoint is used")
    return None, complaints


def rotate(folder: Path, keep: int | None, newest: int) -> None:
    """Delete the oldest checkpoints beyond `keep`, counted back from step `newest`; None keeps all.

    Later ones, of before a resume from an older one and damaged perhaps, must not push out what was just written.
    """
    if keep is not None:
        for _, path in [entry for entry in checkpoints(folder) if entry[0] <= newest][:-keep]:
            shutil.rmtree(path)


def save_checkpoint(
    folder: Path, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]
) -> Path:
    """Write `checkpoint-{step}` under `folder`.

    Args:
        folder: the run's `checkpoints/`.
        step: optimizer steps done.
        model: weights by name.
        optimizer: optimizer state, as `optim.state_by_name` gives it.
        state: anything else, as JSON.

    Raises:
        RunFolderError: it cannot be written; the older checkpoints stay.
    """
    with committed(folder / f"checkpoint-{step}") as writing:
        save_tensors(model, writing / "model.safetensors")
        save_tensors(optimizer, writing / "optimizer.safetensors")
        (writing / "trainer_state.json").write_text(json.dumps(state, indent=2, ensure_ascii=False), encoding="utf-8")
    return folder / f"checkpoint-{step}"


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Model weights, optimizer state and trainer state of a checkpoint.

    Raises:
        RunFolderError: it is damaged or no checkpoint; nothing of it was used.
    """
    reason = damage(path)
    if reason is not None:
        raise RunFolderError(f"{path}: {reason}; use another checkpoint, or --resume to take the newest sound one")
    state: dict[str, Any] = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    return load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors"), state


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors, on the CPU, each with storage of its own (tied weights share theirs)."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        if own.data_ptr() in seen:
            own = own.clone()
        seen.add(own.data_ptr())
        separate[name] = own
    save_file(separate, path, metadata={"format": "pt"})

"""Checkpoints: all that a run needs to go on, in a folder that exists only when it is complete.

    checkpoints/checkpoint-250/
      model.safetensors        weights by name
      optimizer.safetensors    optimizer state, "<parameter> <entry>" → tensor
      trainer_state.json       format, step, scaler, best metric, token budget, the mathematics of the run
      manifest.json            size and SHA-256 of every file above

Tensors are safetensors, the rest is JSON: nothing is ever unpickled. No random state is stored, because none is needed:
order of the examples, dropout and learning rate are functions of the step.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from accel_trainer.errors import RunFolderError
from accel_trainer.writing import committed, damage, remove

FILES = ("model.safetensors", "optimizer.safetensors", "trainer_state.json")
FORMAT = "accel_trainer checkpoint 1"  # in trainer_state.json; another number where an older program would misread it
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


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
        reason = flaw(path)
        if reason is None:
            return path, complaints
        complaints.append(f"{path} is damaged: {reason}; it is passed over")
    return None, complaints


def flaw(path: Path) -> str | None:
    """What keeps a checkpoint from being used, found before anything of it is; None if it is sound."""
    reason = damage(path, FILES)
    if reason is not None:
        return reason
    try:
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"trainer_state.json cannot be read ({type(error).__name__})"
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        return f"trainer_state.json is not that of an {FORMAT}"
    return None


def rotate(folder: Path, keep: int | None, newest: int) -> None:
    """Delete the oldest checkpoints beyond `keep`, counted back from step `newest`; None keeps all.

    Later ones, of before a resume from an older one and damaged perhaps, must not push out what was just written.
    """
    if keep is not None:
        for _, path in [entry for entry in checkpoints(folder) if entry[0] <= newest][:-keep]:
            remove(path)


def abandon_later(folder: Path, step: int) -> None:
    """Take the checkpoints after `step` out of the way of the run that goes on from there; they are kept, renamed."""
    for later, path in checkpoints(folder):
        if later > step:
            abandoned = path.with_name(f"abandoned-{path.name}")
            remove(abandoned)
            path.rename(abandoned)


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
        text = json.dumps({"format": FORMAT, **state}, indent=2, ensure_ascii=False)
        (writing / "trainer_state.json").write_text(text, encoding="utf-8")
    return folder / f"checkpoint-{step}"


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Model weights, optimizer state and trainer state of a checkpoint.

    Raises:
        RunFolderError: it is damaged or no checkpoint; nothing of it was used.
    """
    if not path.is_dir():
        raise RunFolderError(f"{path}: there is no such folder; name a checkpoint, or use --resume")
    reason = flaw(path)
    if reason is not None:
        raise RunFolderError(f"{path}: {reason}; use another checkpoint, or --resume to take the newest sound one")
    state: dict[str, Any] = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    del state["format"]
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

"""Checkpoints come back as they were written, and not at all when damaged; a full disk takes none of the older ones."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from accel_trainer import checkpoint, writing
from accel_trainer.checkpoint import (
    abandon_later,
    checkpoints,
    load_checkpoint,
    newest_sound,
    rotate,
    save_checkpoint,
    save_tensors,
)
from accel_trainer.errors import RunFolderError
from accel_trainer.writing import MANIFEST, damage, restore_interrupted

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.int64)}
OPTIMIZER = {"a exp_avg": torch.full((2, 3), 0.5)}
STATE = {"step": 3, "name": "面"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class NoSpace:
    """Lets the first `allowed` calls of the wrapped functions through, then the disk is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allowed: int, *, only_once: bool) -> None:
        self.calls, self.failed = 0, False
        for owner, name in [
            (writing, "_flush"),
            (Path, "open"),
            (Path, "write_text"),
            (Path, "mkdir"),
            (Path, "rename"),
            (checkpoint, "save_file"),
        ]:
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name), allowed, only_once))

    def wrap(self, function: Callable[..., Any], allowed: int, only_once: bool) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            self.calls += 1
            if self.calls == allowed + 1 or (self.calls > allowed and not only_once):
                self.failed = True
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **keywords)

        return wrapped


@pytest.mark.parametrize("only_once", [True, False])
@pytest.mark.parametrize("existed", [True, False])
def test_a_disk_that_fills_up_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existed: bool, only_once: bool
) -> None:
    """For every k: the k-th call that touches the disk fails, once or from then on."""
    final = tmp_path / "checkpoints" / "checkpoint-3"
    final.parent.mkdir()
    if existed:
        save_checkpoint(final.parent, 3, {"a": torch.zeros(1)}, {}, {"old": True})
    old = contents(final)
    failures = 0
    for allowed in range(200):
        with monkeypatch.context() as patch:
            disk = NoSpace(patch, allowed, only_once=only_once)
            said = ""
            try:
                save_checkpoint(final.parent, 3, WEIGHTS, OPTIMIZER, STATE)
            except RunFolderError as error:
                said = str(error)
        if not disk.failed:
            break
        if said:
            assert "No space left on device" in said
            assert "--output_dir" in said
            failures += 1
        else:  # what lay aside could not be renamed to be deleted: the new one is written, and the next sweep tries again
            assert existed
            assert load_checkpoint(final)[2] == STATE
        restore_interrupted(final)  # as the next start does, for what a dead process could not
        if final.exists():
            assert damage(final) is None
            assert contents(final) == old or load_checkpoint(final)[2] == STATE
        else:
            assert not existed
        assert not list(final.parent.glob(".*.writing"))
        shutil.rmtree(final.parent)  # and once more from the beginning
        final.parent.mkdir()
        if existed:
            save_checkpoint(final.parent, 3, {"a": torch.zeros(1)}, {}, {"old": True})
    assert failures > 10
    assert load_checkpoint(final)[2] == STATE


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, WEIGHTS, OPTIMIZER, STATE)
    assert path == tmp_path / "checkpoint-3"
    weights, optimizer, state = load_checkpoint(path)
    for before, after in ((WEIGHTS, weights), (OPTIMIZER, optimizer)):
        assert set(before) == set(after)
        assert all(
            torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before
        )
    assert state == STATE


def test_tied_and_strided_tensors(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    save_tensors(
        {"a": weight, "tied": weight, "turned": weight.t(), "empty": torch.empty(0)}, tmp_path / "x.safetensors"
    )
    loaded = load_file(tmp_path / "x.safetensors")
    assert torch.equal(loaded["a"], weight)
    assert torch.equal(loaded["tied"], weight)
    assert torch.equal(loaded["turned"], weight.t())
    save_tensors({}, tmp_path / "none.safetensors")
    assert load_file(tmp_path / "none.safetensors") == {}


def test_nothing_pickled_inside(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, WEIGHTS, OPTIMIZER, STATE)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    for file in path.iterdir():
        start = file.read_bytes()[:2]
        assert start != b"PK"
        assert not start.startswith(b"\x80")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer_state.json", MANIFEST])
def test_nothing_is_loaded_of_a_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = save_checkpoint(tmp_path, 3, WEIGHTS, OPTIMIZER, STATE)
    os.truncate(path / name, 10)
    monkeypatch.setattr(checkpoint, "load_file", lambda *_: pytest.fail("something was loaded"))
    with pytest.raises(RunFolderError, match=rf"{name} .*use another checkpoint, or --resume"):
        load_checkpoint(path)


def test_newest_sound(tmp_path: Path) -> None:
    assert newest_sound(tmp_path / "none") == (None, [])
    for step in (2, 10, 9):
        save_checkpoint(tmp_path, step, WEIGHTS, {}, {})
    (tmp_path / ".checkpoint-99.writing").mkdir()
    (tmp_path / "checkpoint-last").mkdir()
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 9, 10]
    assert newest_sound(tmp_path) == (tmp_path / "checkpoint-10", [])
    os.truncate(tmp_path / "checkpoint-10" / "model.safetensors", 5)
    path, complaints = newest_sound(tmp_path)
    assert path == tmp_path / "checkpoint-9"
    assert len(complaints) == 1
    assert "checkpoint-10 is damaged: model.safetensors has 5 bytes" in complaints[0]
    for step in (2, 9):
        (tmp_path / f"checkpoint-{step}" / MANIFEST).unlink()
    path, complaints = newest_sound(tmp_path)
    assert path is None
    assert len(complaints) == 3


@pytest.mark.parametrize(("keep", "left"), [(None, [2, 9, 10, 11]), (1, [11]), (2, [10, 11]), (7, [2, 9, 10, 11])])
def test_rotate(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    for step in (2, 10, 9, 11):
        save_checkpoint(tmp_path, step, WEIGHTS, {}, {})
    (tmp_path / "notes").mkdir()
    rotate(tmp_path, keep, 11)
    assert [step for step, _ in checkpoints(tmp_path)] == left
    assert (tmp_path / "notes").exists()


def test_rotate_never_takes_the_one_just_written(tmp_path: Path) -> None:
    """After a resume from an older one, newer ones lie there, damaged perhaps; they are no reason to delete it."""
    for step in (2, 3, 6, 8):
        save_checkpoint(tmp_path, step, WEIGHTS, {}, {})
    rotate(tmp_path, 1, 3)
    assert [step for step, _ in checkpoints(tmp_path)] == [3, 6, 8]


def test_rotate_goes_on_where_it_cannot_delete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be deleted must not end a run whose newest checkpoint is written."""
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, WEIGHTS, {}, {})
    rmdir, unlink = os.rmdir, os.unlink

    def stubborn(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, *arguments: Any, **keywords: Any) -> Any:
            if str(path).endswith(("checkpoint-1", MANIFEST)):
                raise PermissionError(errno.EACCES, "Permission denied")
            return function(path, *arguments, **keywords)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", stubborn(rmdir))
        patch.setattr(os, "unlink", stubborn(unlink))
        rotate(tmp_path, 2, 4)
    assert [step for step, path in checkpoints(tmp_path) if damage(path) is None] == [3, 4]


def test_later_checkpoints_are_laid_aside(tmp_path: Path) -> None:
    assert abandon_later(tmp_path / "none", 3) is None  # type: ignore[func-returns-value]
    for step in (2, 3, 6, 10):
        save_checkpoint(tmp_path, step, WEIGHTS, {}, {"step": step})
    abandon_later(tmp_path, 3)
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 3]
    assert load_checkpoint(tmp_path / "abandoned-checkpoint-6")[2] == {"step": 6}
    save_checkpoint(tmp_path, 6, WEIGHTS, {}, {"step": "another 6"})
    abandon_later(tmp_path, 3)  # of the same step, the later history is kept
    assert load_checkpoint(tmp_path / "abandoned-checkpoint-6")[2] == {"step": "another 6"}
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-2",
        "checkpoint-3",
        "abandoned-checkpoint-6",
        "abandoned-checkpoint-10",
    }
    assert newest_sound(tmp_path) == (tmp_path / "checkpoint-3", [])

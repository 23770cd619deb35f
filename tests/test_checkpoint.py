"""Folders that exist only when complete, whatever fails while they are written; damage that is always found."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from accel_trainer import checkpoint
from accel_trainer.checkpoint import (
    MANIFEST,
    checkpoints,
    committed,
    damage,
    load_checkpoint,
    newest_sound,
    restore_interrupted,
    rotate,
    save_checkpoint,
    save_tensors,
)
from accel_trainer.errors import RunFolderError

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.int64)}
OPTIMIZER = {"a exp_avg": torch.full((2, 3), 0.5)}
STATE = {"step": 3, "name": "面"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, text: str) -> None:
    (folder / "sub").mkdir()
    (folder / "one.txt").write_text(text)
    (folder / "sub" / "two.txt").write_text(text * 2)


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "final"
    with committed(final) as writing:
        fill(writing, "new")
        assert not final.exists()
    assert set(contents(final)) == {"one.txt", "sub/two.txt", MANIFEST}
    assert damage(final) is None
    assert [path.name for path in final.parent.iterdir()] == ["final"]
    with committed(final) as writing:
        (writing / "three.txt").write_text("newer")
        assert (final / "one.txt").read_text() == "new"
    assert set(contents(final)) == {"three.txt", MANIFEST}
    assert [path.name for path in final.parent.iterdir()] == ["final"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("existed", [True, False])
def test_an_exception_inside_leaves_what_was(tmp_path: Path, error: BaseException, existed: bool) -> None:
    final = tmp_path / "final"
    if existed:
        with committed(final) as writing:
            fill(writing, "old")
    before = contents(tmp_path)

    def interrupted() -> None:
        with committed(final) as writing:
            fill(writing, "new")
            raise error

    with pytest.raises(RunFolderError if isinstance(error, OSError) else type(error)):
        interrupted()
    assert contents(tmp_path) == before


class NoSpace:
    """Lets the first `allowed` calls of the wrapped functions through, then the disk is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allowed: int, *, only_once: bool) -> None:
        self.calls, self.failed = 0, False
        for owner, name in [
            (checkpoint, "_flush"),
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
        assert "No space left on device" in said
        assert "--output_dir" in said
        failures += 1
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


def test_a_failed_exchange_leaves_the_old_folder_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "final"
    with committed(final) as writing:
        fill(writing, "old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".writing"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(RunFolderError, match="Input/output error"), committed(final) as writing:
        fill(writing, "new")
    assert (final / "one.txt").read_text() == "old"
    assert damage(final) is None


def test_manifest_is_inside_before_the_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is killed between any two calls leaves no folder without a manifest under the final name."""
    final = tmp_path / "final"
    rename, seen = Path.rename, []

    def watching(self: Path, target: Path) -> Path:
        seen.append((self.name, damage(self)))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watching)
    for text in ("first", "second"):
        with committed(final) as writing:
            fill(writing, text)
    assert seen == [(".final.writing", None), ("final", None), (".final.writing", None)]


def test_files_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(Path(f"/proc/self/fd/{fd}").readlink().name), fsync(fd))[1]
    )
    monkeypatch.setattr(Path, "rename", lambda self, target: (events.append("rename"), rename(self, target))[1])
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc to read names of descriptors from")
    with committed(tmp_path / "final") as writing:
        fill(writing, "x")
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert set(before) == {"one.txt", "two.txt", MANIFEST, ".final.writing"}
    assert after == [tmp_path.name]


def test_restore_interrupted(tmp_path: Path) -> None:
    final, aside = tmp_path / "best", tmp_path / ".best.old"
    restore_interrupted(final)
    assert not final.exists()
    aside.mkdir()
    (aside / "x").write_text("old")
    restore_interrupted(final)
    assert (final / "x").read_text() == "old"
    assert not aside.exists()
    aside.mkdir()
    restore_interrupted(final)
    assert (final / "x").read_text() == "old"


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
    loaded = checkpoint.load_file(tmp_path / "x.safetensors")
    assert torch.equal(loaded["a"], weight)
    assert torch.equal(loaded["tied"], weight)
    assert torch.equal(loaded["turned"], weight.t())
    save_tensors({}, tmp_path / "none.safetensors")
    assert checkpoint.load_file(tmp_path / "none.safetensors") == {}


def test_nothing_pickled_inside(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, WEIGHTS, OPTIMIZER, STATE)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    for file in path.iterdir():
        start = file.read_bytes()[:2]
        assert start != b"PK"
        assert not start.startswith(b"\x80")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda folder: os.truncate(folder / "model.safetensors", 20), "has 20 bytes instead of"),
    "changed": (lambda folder: flip(folder / "optimizer.safetensors"), "other contents"),
    "missing": (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "replaced by a folder": (
        lambda folder: ((folder / "trainer_state.json").unlink(), (folder / "trainer_state.json").mkdir()),
        "trainer_state.json is missing",
    ),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "manifest.json cannot be read"),
    "half a manifest": (lambda folder: os.truncate(folder / MANIFEST, 40), "manifest.json cannot be read"),
    "manifest of another kind": (lambda folder: (folder / MANIFEST).write_text("[1, 2]"), "manifest.json cannot be"),
    "manifest without sizes": (lambda folder: (folder / MANIFEST).write_text('{"a": {}}'), "a is missing"),
    "manifest not text": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe\x00"), "manifest.json cannot be"),
    "empty manifest": (lambda folder: (folder / MANIFEST).write_text("{}"), "manifest.json"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_and_nothing_loaded(tmp_path: Path, kind: str) -> None:
    path = save_checkpoint(tmp_path, 3, WEIGHTS, OPTIMIZER, STATE)
    assert damage(path) is None
    harm, said = DAMAGES[kind]
    harm(path)
    assert said in (damage(path) or "")
    with pytest.raises(RunFolderError, match="use another checkpoint, or --resume"):
        load_checkpoint(path)


def test_every_byte_counts(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"a": torch.ones(2)}, {}, {})
    entries = json.loads((path / MANIFEST).read_text())
    assert set(entries) == {"model.safetensors", "optimizer.safetensors", "trainer_state.json"}
    for name in entries:
        whole = (path / name).read_bytes()
        for i in range(0, len(whole), 7):
            (path / name).write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
            assert damage(path) is not None
        (path / name).write_bytes(whole)
    assert damage(path) is None


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

"""Files and folders that appear whole or not at all, whatever fails while they are written; damage is always found."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from accel_trainer.errors import RunFolderError
from accel_trainer.writing import (
    MANIFEST,
    committed,
    created,
    damage,
    remove,
    replaced,
    restore_interrupted,
    sweep,
    sweep_unfinished,
)


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


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_whoever_may_read_the_text_may_read_the_weights(tmp_path: Path, mask: int, mode: int) -> None:
    """safetensors makes its files for the owner alone."""
    before = os.umask(mask)
    try:
        with committed(tmp_path / "final") as writing:
            save_file({"a": torch.ones(3)}, writing / "model.safetensors")
            (writing / "training.json").write_text("{}")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "final").iterdir()} == {mode}


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
    assert seen == [
        (".final.writing", None),
        ("final", None),
        (".final.writing", None),
        (".final.old", None),  # on its way out
    ]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is flushed, and the renames between."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc to read names of descriptors from")
    events: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def flushing(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def renaming(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    def replacing(self: Path, target: Path) -> Path:
        events.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(Path, "rename", renaming)
    monkeypatch.setattr(Path, "replace", replacing)
    return events


def test_files_reach_the_disk_before_the_name(tmp_path: Path, events: list[str]) -> None:
    with committed(tmp_path / "final") as writing:
        fill(writing, "x")
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert sorted(before[:2]) == ["one.txt", "two.txt"]
    assert before[2:] == [MANIFEST, "sub", ".final.writing"]
    assert after == [tmp_path.name]
    events.clear()
    with committed(tmp_path / "final") as writing:
        fill(writing, "x")
    # Both renames reach the disk before what they replace is deleted, which begins with a rename.
    assert events[5:] == ["rename", "rename", tmp_path.name, "rename"]


def test_a_file_reaches_the_disk_before_its_name(tmp_path: Path, events: list[str]) -> None:
    """And so do the folders that had to be made for it."""
    with replaced(tmp_path / "one" / "two" / "x.txt") as temporary:
        temporary.write_text("x")
    assert events == [tmp_path.name, "one", temporary.name, "replace", "two"]


@pytest.mark.parametrize(("number", "told"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_disk_that_cannot_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, told: bool) -> None:
    """Some network storage does not know the call for folders; a disk that fails at it is another matter."""

    def failing(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(RunFolderError) if told else nullcontext(), committed(tmp_path / "final") as writing:
        fill(writing, "x")
    assert (tmp_path / "final").exists() != told


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


def test_what_lies_aside_is_not_lost_to_a_second_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two renames; written again without a sweep in between, and killed once more."""
    final = tmp_path / "final"
    with committed(final) as writing:
        fill(writing, "old")
    final.rename(tmp_path / ".final.old")

    class Killed(BaseException):
        pass

    rename = Path.rename

    def dying(self: Path, target: Path) -> Path:
        if self.name.endswith(".writing"):
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dying)
    with pytest.raises(Killed), committed(final) as writing:
        fill(writing, "new")
    sweep(tmp_path)
    assert damage(final) is None
    assert (final / "one.txt").read_text() == "old"


def test_a_removed_folder_loses_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final, doomed = tmp_path / "final", tmp_path / ".final.deleted"
    remove(final)
    assert list(tmp_path.iterdir()) == []
    with committed(final) as writing:
        fill(writing, "x")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", full)
        remove(final)
    assert not final.exists()
    assert damage(doomed) is None
    with committed(final) as writing:  # what could not be deleted before is in nobody's way
        fill(writing, "y")
    remove(final)
    assert list(tmp_path.iterdir()) == []


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.EACCES, "Permission denied")


def test_sweep(tmp_path: Path) -> None:
    run, inner = tmp_path, tmp_path / "inner"
    for name in ("best", "model", ".model.old", ".best.writing", ".best.old.deleted"):
        with committed(run / name) as writing:
            fill(writing, name)
    for name in (".checkpoint-3.old", ".checkpoint-4.writing", ".checkpoint-1.deleted", "checkpoint-2"):
        with committed(inner / name) as writing:
            fill(writing, name)
    (inner / ".checkpoint-3.old").rename(run / ".lost.old")
    for name in (".status.json.123.writing", ".hidden", "notes.writing", "notes.old", ".best-before"):
        (run / name).write_text("x")
    sweep(run, inner, run / "none")
    assert {path.name for path in run.iterdir()} == {
        *("best", "model", "lost", "inner", ".hidden", "notes.writing", "notes.old", ".best-before")
    }
    assert (run / "model" / "one.txt").read_text() == "model"
    assert (run / "lost" / "one.txt").read_text() == ".checkpoint-3.old"
    assert {path.name for path in inner.iterdir()} == {"checkpoint-2"}
    before = contents(run)
    sweep(run, inner)
    assert contents(run) == before


def test_what_cannot_be_put_back_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".best.old").mkdir()
    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(RunFolderError, match=r"cannot rename .*\.best\.old to best: Permission denied"):
        sweep(tmp_path)
    assert (tmp_path / ".best.old").exists()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def exchanged(folder: Path) -> None:
    (folder / "trainer_state.json").unlink()
    (folder / "trainer_state.json").mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda folder: os.truncate(folder / "model.safetensors", 20), "has 20 bytes instead of"),
    "changed": (lambda folder: flip(folder / "optimizer.safetensors"), "other contents"),
    "missing": (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "replaced by a folder": (
        exchanged,
        "trainer_state.json is missing",
    ),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "manifest.json cannot be read"),
    "half a manifest": (lambda folder: os.truncate(folder / MANIFEST, 40), "manifest.json cannot be read"),
    "manifest of another kind": (lambda folder: (folder / MANIFEST).write_text("[1, 2]"), "manifest.json cannot be"),
    "manifest without sizes": (lambda folder: (folder / MANIFEST).write_text('{"a": {}}'), "a is missing"),
    "manifest not text": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe\x00"), "manifest.json cannot be"),
    "empty manifest": (lambda folder: (folder / MANIFEST).write_text("{}"), "manifest.json"),
}


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """A committed folder with two binary files and a text."""
    with committed(tmp_path / "final") as writing:
        save_file({"a": torch.ones(3)}, writing / "model.safetensors")
        save_file({"b": torch.ones(3, dtype=torch.bfloat16)}, writing / "optimizer.safetensors")
        (writing / "trainer_state.json").write_text("{}")
    return tmp_path / "final"


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found(sound: Path, kind: str) -> None:
    assert damage(sound) is None
    harm, said = DAMAGES[kind]
    harm(sound)
    assert said in (damage(sound) or "")


def test_every_byte_counts(sound: Path) -> None:
    entries = json.loads((sound / MANIFEST).read_text())
    assert set(entries) == {"model.safetensors", "optimizer.safetensors", "trainer_state.json"}
    for name in entries:
        whole = (sound / name).read_bytes()
        for i in range(len(whole)):
            (sound / name).write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
            assert damage(sound) is not None
        (sound / name).write_bytes(whole)
    assert damage(sound) is None


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: what the kernel does then is what a full disk does, but for the number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_inside_of_safetensors(tmp_path: Path) -> None:
    """safetensors raises an error of its own, which is no OSError, whatever the system said."""
    final = tmp_path / "final"
    with committed(final) as writing:
        fill(writing, "old")
    before = contents(tmp_path)
    tensors = {"a": torch.ones(500_000)}
    with pytest.raises(SafetensorError, match="I/O error"), files_up_to(1_000_000):
        save_file(tensors, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").unlink(missing_ok=True)
    for leftover in tmp_path.glob(".tmp*"):
        leftover.unlink()
    with (
        pytest.raises(RunFolderError, match=r"cannot write .*final: .*File too large.*--resume"),
        files_up_to(1_000_000),
        committed(final) as writing,
    ):
        save_file(tensors, writing / "model.safetensors")
    assert contents(tmp_path) == before
    assert damage(final) is None


# --- single files


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "x.txt"
    for text in ("first", "second"):
        before = final.read_text() if final.exists() else None
        with replaced(final) as writing:
            writing.write_text(text)
            assert (final.read_text() if final.exists() else None) == before
        assert final.read_text() == text
        assert [path.name for path in final.parent.iterdir()] == ["x.txt"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("written", [True, False])
def test_an_exception_leaves_the_old_file(tmp_path: Path, error: BaseException, written: bool) -> None:
    final = tmp_path / "x.txt"
    final.write_text("old")

    def interrupted() -> None:
        with replaced(final) as writing:
            if written:
                writing.write_text("half")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert contents(tmp_path) == {"x.txt": b"old"}


def test_two_that_write_one_file_are_not_in_each_others_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one number too, as the first processes of two containers have."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    final = tmp_path / "x.txt"
    with replaced(final) as one:
        one.write_text("one")
        with replaced(final) as other:
            other.write_text("other")
        assert final.read_text() == "other"
        assert one.read_text() == "one"
    assert contents(tmp_path) == {"x.txt": b"one"}


@pytest.mark.parametrize("links", [True, False])
def test_of_all_who_make_a_file_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """And nobody sees it before it is whole, where the file system has hard links."""
    if not links:
        monkeypatch.setattr(os, "link", refused)
    final = tmp_path / "deep" / "x.txt"
    with created(final) as first:
        first.write_text("first")
        assert not final.exists()

    def again() -> None:
        with created(final) as second:
            second.write_text("second")

    with pytest.raises(FileExistsError):
        again()
    assert contents(tmp_path) == {"deep/x.txt": b"first"}
    with pytest.raises(KeyboardInterrupt), created(tmp_path / "y.txt"):
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"deep/x.txt": b"first"}


def refused(*_: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


KILLED = """
import os, signal, sys
from pathlib import Path
from accel_trainer.writing import replaced
with replaced(Path(sys.argv[1])) as writing:
    writing.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_only_what_nobody_writes_is_swept_where_others_may_be_writing(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "x")], check=False)
    (left,) = tmp_path.iterdir()
    assert re.fullmatch(r"\.x\.[0-9a-f]{8}-[0-9]+-[0-9a-f]{8}\.writing", left.name)
    foreign = f".x.00000000{left.name[11:]}"  # of another machine, where that process may live
    (tmp_path / foreign).touch()
    for name in (".old.txt.7.writing", ".new.txt.7.writing", "notes.writing"):
        (tmp_path / name).touch()
    for name in (".old.txt.7.writing", "notes.writing"):
        os.utime(tmp_path / name, (1, 1))
    with replaced(tmp_path / "alive") as writing:
        writing.write_text("whole")
        sweep_unfinished(tmp_path, tmp_path / "none")
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {foreign, ".new.txt.7.writing", "notes.writing", writing.name}
    assert (tmp_path / "alive").read_text() == "whole"


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), replaced(tmp_path / "file" / "x.txt"):
        pytest.fail("there is nowhere to write")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
        (Exception("No space left on device (os error 28)"), "No space left"),  # of tokenizers
    ],
)
def test_whatever_library_says_what_the_disk_said(tmp_path: Path, error: Exception, said: str) -> None:
    with pytest.raises(RunFolderError, match=f"cannot write .*final: .*{said}"), committed(tmp_path / "final"):
        raise error
    with pytest.raises(Exception, match="other") as caught, committed(tmp_path / "final"):
        raise Exception("something other")
    assert type(caught.value) is Exception

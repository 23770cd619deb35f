"""A claim is one process's alone while that process lives and holds it, wherever there are locks."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from accel_trainer import claims
from accel_trainer.claims import Claims


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "claims"


@pytest.fixture
def ours(path: Path) -> Iterator[Claims]:
    held = Claims(path)
    yield held
    held.close()


def in_a_child(deed: Callable[[], int]) -> int:
    """What `deed` gives in another process: a small number, 99 if it fails."""
    child = os.fork()
    if not child:
        code = 99
        try:
            code = deed()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def granted(path: Path, *pieces: int) -> list[bool]:
    """Whether another process, which opens the file itself, is granted each of these."""

    def deed() -> int:
        theirs, found = Claims(path), 0
        for i, piece in enumerate(pieces):
            with theirs.claimed(piece) as mine:
                found |= mine << i
        return found

    code = in_a_child(deed)
    assert code < 99
    return [bool(code >> i & 1) for i in range(len(pieces))]


def test_a_claim_is_one_processs_alone(path: Path, ours: Claims) -> None:
    with ours.claimed(3) as mine, ours.claimed(0) as first:
        assert mine
        assert first
        assert granted(path, 3, 4, 0) == [False, True, False]
    assert granted(path, 3, 0) == [True, True]
    with pytest.raises(ValueError, match="x"), ours.claimed(3):
        raise ValueError("x")
    assert granted(path, 3) == [True]


def test_who_dies_has_no_claims(path: Path, ours: Claims) -> None:
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            with Claims(path).claimed(3):
                os.write(tell, b"held")
                signal.pause()
        finally:
            os._exit(1)
    os.close(tell)  # or reading would wait for a child that failed
    try:
        assert os.read(told, 4) == b"held"
        with ours.claimed(3) as mine:
            assert not mine
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
    with ours.claimed(3) as mine:
        assert mine


def test_a_file_that_others_have_claims_on_can_be_locked(path: Path, ours: Claims) -> None:
    """The first piece is what it is tried with."""
    with ours.claimed(0):
        assert in_a_child(lambda: Claims(path).are_kept) == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, None])
def test_without_locks_any_claim_is_granted(path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None) -> None:
    if number is None:
        monkeypatch.setattr(claims, "fcntl", None)  # of a system that has none
    else:
        monkeypatch.setattr(claims.fcntl, "lockf", failing(number))
    found = Claims(path)
    monkeypatch.undo()
    assert not found.are_kept
    with found.claimed(3) as mine:
        assert mine
        assert granted(path, 3) == [True]
    found.close()


def test_locks_that_fail_for_a_moment_give_no_claim(path: Path, ours: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(claims.fcntl, "lockf", failing(errno.ENOLCK))
        with ours.claimed(1) as mine:
            assert not mine
    assert ours.are_kept
    with ours.claimed(1) as mine:
        assert mine
        assert granted(path, 1) == [False]


def test_a_claim_that_cannot_be_let_go_of_ends_with_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Claims(path)
    with monkeypatch.context() as patch, ours.claimed(1) as mine:
        assert mine
        patch.setattr(claims.fcntl, "lockf", failing(errno.ENOLCK))
    assert granted(path, 1) == [False]
    ours.close()
    assert granted(path, 1) == [True]


def test_other_errors_are_told(path: Path, ours: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims.fcntl, "lockf", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        Claims(path)
    with pytest.raises(OSError, match="Input/output error"), ours.claimed(1):
        pytest.fail("nothing is held")


def failing(number: int) -> Callable[..., Any]:
    def lockf(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return lockf

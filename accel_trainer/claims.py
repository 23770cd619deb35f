"""Who does which of many pieces of work: processes on one machine or several, in one launch or several, that share a file.

What a process has claimed, no other gets; the system lets go of it when the process dies, however it dies.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl as system
except ImportError:  # Windows
    system = None  # type: ignore[assignment]
fcntl: Any = system

_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system


class Claims:
    """Claims on pieces 0, 1, …: locks on the bytes of one file, which stays empty."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it.

        Raises:
            OSError: it cannot be made.
        """
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.are_kept = True  # False where the file system, or the system, has no locks: any claim is granted then
        with self.claimed(0):  # tries whether they work
            pass

    @contextmanager
    def claimed(self, piece: int, *, wait: bool = False) -> Iterator[bool]:
        """Hold the claim on a piece while the block lasts.

        Args:
            piece: its number.
            wait: until who holds it lets go or dies.

        Yields:
            whether it is held; False only where another process holds it and `wait` is not given.
        """
        granted = self._lock(piece, wait=wait)
        try:
            yield granted
        finally:
            if granted and self.are_kept:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, piece)

    def _lock(self, piece: int, *, wait: bool) -> bool:
        if fcntl is None:
            self.are_kept = False
        if not self.are_kept:
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, piece)
        except OSError as error:
            if error.errno in _HELD and not wait:
                return False
            if error.errno not in _NO_LOCKS:
                raise
            self.are_kept = False
        return True

    def close(self) -> None:
        """Let go of everything."""
        with suppress(OSError):
            os.close(self._file)

"""Who does which of many pieces of work: processes on one machine or several, in one launch or several, that share a file.

What a process has claimed, no other gets; the system lets go of it when the process dies, however it dies. Between machines
this holds as far as the file system's locks reach: some grant them on one machine alone (NFS with `local_lock` or `nolock`,
Lustre with `localflock`), where two machines may get one piece. So what is done to a piece twice must do no harm.
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

_HELD = (errno.EACCES, errno.EAGAIN)  # by another process
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system


class Claims:
    """Claims on pieces 0, 1, …: locks on the bytes of one file, which stays empty."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it.

        Raises:
            OSError: it cannot be made.
        """
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        # False where the file system, or the system, has no locks: any claim is granted then. Decided once, as who has claimed
        # something must not lose it when the locks fail for a moment.
        self.are_kept = fcntl is not None and self._try_locks()

    def _try_locks(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, 0)
        except OSError as error:
            if error.errno not in (*_HELD, *_NO_LOCKS):
                self.close()
                raise
            return error.errno in _HELD
        return True

    @contextmanager
    def claimed(self, piece: int) -> Iterator[bool]:
        """Hold the claim on a piece while the block lasts.

        Yields:
            whether it is held: False where another process holds it, or the locks fail for a moment.
        """
        granted = self._lock(piece)
        try:
            yield granted
        finally:
            if granted and self.are_kept:
                with suppress(OSError):  # it goes when this process does
                    fcntl.lockf(self._file, fcntl.LOCK_UN, 1, piece)

    def _lock(self, piece: int) -> bool:
        if self.are_kept:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, piece)
            except OSError as error:
                if error.errno not in (*_HELD, errno.ENOLCK):
                    raise
                return False
        return True

    def close(self) -> None:
        """Let go of everything."""
        with suppress(OSError):
            os.close(self._file)

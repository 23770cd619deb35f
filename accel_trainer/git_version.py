"""What git knows of the checkout that a folder lies in; no program is run that the checkout names.

A shared checkout has its settings from somebody else: hooks, filters and monitors, which would run as whoever looks.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

PATIENCE = 5  # seconds for an answer

# The user's own settings. The others may mean another checkout, as in a hook of git's, or name programs.
_KEPT = ("GIT_CONFIG", "GIT_CEILING_DIRECTORIES", "GIT_DISCOVERY_ACROSS_FILESYSTEM", "GIT_EXEC_PATH")
# No fetch of objects that a partial clone lacks, through a program of its choice; no index written, so that no hook is due.
_FORBIDDEN = {"GIT_ALLOW_PROTOCOL": "", "GIT_NO_LAZY_FETCH": "1", "GIT_OPTIONAL_LOCKS": "0"}
_OPTIONS = ("--no-pager", "-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")


def commit(folder: Path) -> str | None:
    """Commit of the checkout, with `+changes` where it is known not to be clean; None outside of one."""
    found = _line(folder, "rev-parse", "--verify", "HEAD")
    return f"{found}+changes" if found and _is_changed(folder) else found or None


def version(folder: Path) -> str:
    """Branch, tag and commit of the checkout, and `changed` where it is known not to be clean; empty outside of one."""
    branch, found = _line(folder, "branch", "--show-current"), _line(folder, "describe", "--tags", "--always")
    if not found:
        return ""
    said = f"{branch} at {found}" if branch else found
    return f"{said}, changed" if _is_changed(folder) else said


def _is_changed(folder: Path) -> bool:
    """Whether tracked files are known to differ from the commit; where a filter, which is a program, would say, they are not."""
    files = _git(folder, "ls-files", "-z", "--", ":/")
    filters = None if files is None else _git(folder, "check-attr", "-z", "--stdin", "filter", typed=files)
    # Triples of file, attribute, value.
    if filters is None or set(filters.split(b"\0")[2::3]) - {b"unspecified", b"unset"}:
        return False
    # Of a submodule its commit alone: git would look for changes in it with its own settings.
    return bool(_git(folder, "status", "--porcelain", "--untracked-files=no", "--ignore-submodules=dirty"))


def _line(folder: Path, *arguments: str) -> str:
    return (_git(folder, *arguments) or b"").decode(errors="replace").strip()


def _git(folder: Path, *arguments: str, typed: bytes = b"") -> bytes | None:
    """What git answers; None if it does not: no git, no checkout, or one too slow to wait for."""
    command = ["git", *_OPTIONS, "-C", str(folder), *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {name: value for name, value in os.environ.items() if name.startswith(_KEPT)} | _FORBIDDEN
    try:
        done = subprocess.run(command, input=typed, capture_output=True, timeout=PATIENCE, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout

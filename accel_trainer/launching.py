"""Launches of the trainer by another command of this package: started, waited for, ended together with all they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

TRAINER = "accel_trainer.train"
LAUNCHER = (sys.executable, "-m", "accelerate.commands.launch")
# What a launch tells the processes that it starts; the launches inside of it must not hear it.
LAUNCH_VARIABLES = (
    *("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "MASTER_"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
)
STDERR = 2  # its number, because `sys.stderr` may be no file
LAST_LINES = 20


def no_launch_around() -> dict[str, str]:
    """The environment of this process without what a launch around it put there."""
    return {name: value for name, value in os.environ.items() if not name.startswith(LAUNCH_VARIABLES)}


def launched(
    command: Sequence[str], environment: Mapping[str, str] | None = None, *, shown: bool = False
) -> tuple[int, str]:
    """Start a launcher and wait for it; if this process is interrupted meanwhile, ask it and all that it started to stop.

    Args:
        command: the launcher's.
        environment: None for this process's own, without what a launch around it put there.
        shown: let all that it says go to stderr.

    Returns:
        its exit code; and the last lines that it wrote to stderr, empty where they were shown.
    """
    # A session of its own, because a signal to accelerate's launcher alone leaves the trainer running.
    process = subprocess.Popen(
        command,
        env=no_launch_around() if environment is None else environment,
        stdin=subprocess.DEVNULL,
        stdout=STDERR if shown else subprocess.DEVNULL,
        stderr=None if shown else subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    return process.returncode, "\n".join((errors or "").strip().splitlines()[-LAST_LINES:])

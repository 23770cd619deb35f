"""Two machines for tests: network namespaces of this one, joined by a cable, each with an address of its own.

What they share is the disk; a run that is given two folders sees two machines without shared storage.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from harness import Outcome, user_environment

PATIENCE = 600.0  # seconds that anything is waited for, on a machine that is busy with other things
INTERFACE = "cable0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")  # seen by nobody outside of the two


@cache
def missing() -> str | None:
    """What keeps this machine from being two; None if it can."""
    if shutil.which("ip") is None:
        return "no `ip` command (Debian's package iproute2)"
    try:
        with namespaces() as names:
            _ip("netns", "exec", names[0], "true")
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made ({error.stderr.strip()}); run as root"
    return None


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def namespaces() -> Iterator[tuple[str, str]]:
    """Names of two network namespaces that reach each other and nothing else; nothing in them outlives the block."""
    token = uuid.uuid4().hex[:10]
    names = (f"accel-{token}-0", f"accel-{token}-1")
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", INTERFACE, "netns", names[0], "type", "veth", "peer", "name", INTERFACE, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", name, "link", "set", interface, "up")
        yield names
    finally:
        for name in names:
            with contextlib.suppress(subprocess.CalledProcessError):  # it was never made
                _end_all(name)
                _ip("netns", "delete", name)


def _end_all(name: str) -> None:
    """SIGKILL to all that runs in a namespace, as when the power goes."""
    end = time.monotonic() + PATIENCE
    while running := [int(process) for process in _ip("netns", "pids", name).split()]:
        assert time.monotonic() < end, f"{running} cannot be killed"
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


@dataclass
class Host:
    """One of the machines."""

    name: str  # of its namespace
    address: str
    place: Path  # its working folder, and the only one that is its own
    environment: dict[str, str] = field(default_factory=dict)
    _launched: list[tuple[subprocess.Popen[bytes], Path]] = field(default_factory=list)

    def launch(self, command: list[str], **environment: str) -> None:
        """Start a command in its working folder."""
        self.place.mkdir(parents=True, exist_ok=True)
        log = self.place / f"{self.address}-{len(self._launched)}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                cwd=self.place,
                env=user_environment(self.place, **{**self.environment, **environment}),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._launched.append((process, log))

    @property
    def said(self) -> str:
        """What its last launch printed."""
        return self._launched[-1][1].read_text(encoding="utf-8", errors="replace")

    @property
    def is_up(self) -> bool:
        """Whether its last launch is still going on."""
        return self._launched[-1][0].poll() is None

    def trainers(self) -> list[int]:
        """Process ids of what a launcher started, which told each its rank."""
        found = []
        for process in map(int, _ip("netns", "pids", self.name).split()):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if b"\0RANK=" in Path(f"/proc/{process}/environ").read_bytes():
                    found.append(process)
        return found

    def cut_power(self) -> None:
        """Every process of it is gone at once."""
        _end_all(self.name)
        for process, _ in self._launched:
            process.wait(PATIENCE)

    def ended(self, run: str) -> Outcome:
        """How its last launch ended, and what it left in the folder `run` of its own."""
        process, _ = self._launched[-1]
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.address} does not end:\n{self.said}")
        return Outcome(code, self.place / run, self.said, self.said)


@contextlib.contextmanager
def two_hosts(first: Path, second: Path, **environment: str) -> Iterator[tuple[Host, Host]]:
    """Two machines that work in these folders; they share storage if that is one and the same."""
    reason = missing()
    if reason is not None:
        pytest.skip(f"NOT TESTED, several machines: {reason}")
    with namespaces() as names:
        yield (
            Host(names[0], ADDRESSES[0], first, dict(environment)),
            Host(names[1], ADDRESSES[1], second, dict(environment)),
        )


def wait_for(condition: Callable[[], Any], what: str, *hosts: Host) -> None:
    """Until the condition holds; none of the hosts' launches may end before."""
    end = time.monotonic() + PATIENCE
    while not condition():
        told = "\n\n".join(f"{host.address}:\n{host.said}" for host in hosts)
        assert all(host.is_up for host in hosts), f"a launch ended before {what}:\n{told}"
        assert time.monotonic() < end, f"never saw {what}:\n{told}"
        time.sleep(0.05)

"""Real launches that are done harm: started as a user does, watched through what they write, signalled, killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from harness import ROOT, Outcome, user_environment

PATIENCE = 600.0  # seconds that anything is waited for, on a machine that is busy with other things
FAULTS = Path(__file__).parent
PATHS = [str(path) for path in (FAULTS, FAULTS.parent, ROOT)]


def launcher(processes: int) -> list[str]:
    """`accelerate launch` of so many processes on the CPU."""
    config = ROOT / "accelerate_configs" / ("cpu.yaml" if processes == 1 else "multi_cpu.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*command, "--num_processes", str(processes)] if processes > 2 else command


def torchrun(processes: int, restarts: int = 0) -> list[str]:
    """`torchrun` of so many processes, which are started again so many times."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*command, "--max-restarts", str(restarts)]


class Launched:
    """A launch under way, in a session of its own; nothing of it outlives the block."""

    def __init__(
        self, command: list[str], place: Path, recipe: str, name: str, *arguments: str, module: str = "accel_trainer.train",
        **environment: str,
    ) -> None:  # fmt: skip
        self.folder = place / name
        place.joinpath("logs").mkdir(exist_ok=True)
        self._log = place / "logs" / f"{name}-{time.monotonic_ns()}.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "-m", module, recipe, "--output_dir", name, *arguments],
                cwd=place,
                env=user_environment(place, **{"PYTHONPATH": os.pathsep.join(PATHS), **environment}),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._seen: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in {self.process.pid, *self.trainers()} if self.process.poll() is None else self.survivors():
            kill(process, signal.SIGKILL)
        self.process.wait()

    @property
    def said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def trainers(self) -> list[int]:
        """Process ids of the trainers, by rank."""
        found = sorted((rank_of(child), child) for child in children(self.process.pid) if is_trainer(child))
        self._seen.update(child for _, child in found)
        return [child for _, child in found]

    def survivors(self) -> list[int]:
        """Trainers that are still there, launcher or not."""
        return [process for process in self._seen if is_trainer(process)]

    def wait_for(self, condition: Callable[[], Any], what: str = "it") -> None:
        """Until the condition holds; the launch must not end before."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.said}"
            assert time.monotonic() < end, f"never saw {what}:\n{self.said}"
            time.sleep(0.02)
        self.trainers()

    def wait_for_step(self, step: int) -> None:
        """Until that step is logged."""
        self.wait_for(lambda: self.steps() and self.steps()[-1] >= step, f"step {step}")

    def steps(self) -> list[int]:
        """The steps that metrics.jsonl has, a line that is being written left out."""
        try:
            text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8")
        except OSError:
            return []
        return [json.loads(line)["step"] for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads((self.folder / "status.json").read_text())
        return status

    def ended(self) -> Outcome:
        """How the launcher ended, once no trainer is left."""
        code = self.process.wait(PATIENCE)
        end = time.monotonic() + PATIENCE
        while self.survivors():
            assert time.monotonic() < end, f"trainers {self.survivors()} outlive their launcher:\n{self.said}"
            time.sleep(0.02)
        return Outcome(code, self.folder, self.said, self.said)


def children(process: int) -> list[int]:
    """Process ids of the children that a process started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == process:
                found.append(int(entry.name))
        except (OSError, IndexError):
            continue  # it has ended meanwhile
    return found


def is_trainer(process: int) -> bool:
    """Whether it runs a training, and is no zombie."""
    try:
        return b"--output_dir" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def rank_of(process: int) -> int:
    """Rank by the process's environment; 0 for one alone."""
    try:
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return 0
    ranks = [int(variable[5:]) for variable in variables if variable.startswith(b"RANK=")]
    return ranks[0] if ranks else 0


def kill(process: int, number: signal.Signals) -> None:
    """Send a signal, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)

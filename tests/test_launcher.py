"""A process follows its launcher into its end, from its first moment on; without a launcher it follows nobody."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import ROOT

from accel_trainer.launcher import is_launcher

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are told apart through /proc")

WAITING = "import {what}, os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"
# Plays a launcher: starts the child that its last argument is, and waits for it.
PARENT = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()"


def start(folder: Path, name: str, what: str) -> tuple[subprocess.Popen[str], int]:
    """A script of that name, and the process it started."""
    (folder / name).write_text(PARENT)
    command = [sys.executable, str(folder / name), WAITING.format(what=what)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("name", ["accelerate", "torchrun", "accelerate-launch"])
def test_a_launchers_death_is_heard_before_torch_is_there(tmp_path: Path, name: str) -> None:
    parent, child = start(tmp_path, name, "accel_trainer")
    assert is_launcher(parent.pid)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 30
    while lives(child):
        assert time.monotonic() < end, "it outlives its launcher"
        time.sleep(0.01)


@pytest.mark.parametrize(("name", "what"), [("accelerate", "math"), ("my_shell", "accel_trainer")])
def test_others_outlive_their_parents(tmp_path: Path, name: str, what: str) -> None:
    parent, child = start(tmp_path, name, what)
    try:
        assert is_launcher(parent.pid) == (name == "accelerate")
        parent.kill()
        parent.wait()
        time.sleep(0.3)
        assert lives(child)
    finally:
        subprocess.run(["kill", f"-{signal.SIGKILL:d}", str(child)], check=True)


def test_what_is_no_launcher() -> None:
    assert not is_launcher(2**30)
    assert not is_launcher(1) or "accelerate" in Path("/proc/1/cmdline").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_anything_is_done(tmp_path: Path, number: signal.Signals) -> None:
    """While torch is imported, a scheduler must read from the exit code what it would read later."""
    command = [
        sys.executable,
        "-v",
        "-m",
        "accel_trainer.train",
        "recipes/quickstart.yaml",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("import 'torch._C'") or "import 'torch.version'" in line:  # what -v tells
                break
        process.send_signal(number)
        said = process.stderr.read()
    assert process.returncode == 75
    assert "interrupted before anything was done; run the same line again" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_whoever_imports_the_package_keeps_its_signals() -> None:
    code = "import signal; before = signal.getsignal(signal.SIGTERM); import accel_trainer; assert signal.getsignal(signal.SIGTERM) is before"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

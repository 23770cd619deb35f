"""A disk that is really full, or cannot be written: a small file system of its own, where the system lets one be mounted."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Outcome, run_trainer, write_recipe_in
from processes import Launched, launcher

from accel_trainer.checkpoint import checkpoints, newest_sound
from accel_trainer.writing import damage


def mount(place: Path, options: str) -> bool:
    """Whether a file system in memory could be mounted, or mounted otherwise."""
    if shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 100 MB, to be made smaller."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mount(disk, "size=100m"):
        pytest.skip("no file system may be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("disk")
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    write_recipe_in(place, saving=saving, evaluation={"eval_strategy": "steps", "eval_steps": 3})
    return place


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Outcome:
    outcome = run_trainer(place / "tiny.yaml", place / "undisturbed")
    assert outcome.code == 0, outcome.err
    return outcome


def check_kept(folder: Path) -> int:
    """Everything under a final name is whole, nothing else is there; how many checkpoints."""
    found = [path for _, path in checkpoints(folder / "checkpoints")]
    assert all(damage(path) is None for path in found)
    for name in ("best", "model"):
        assert not (folder / name).exists() or damage(folder / name) is None
    assert not list(folder.rglob(".*.writing"))
    return len(found)


@pytest.mark.parametrize("kilobytes", [16, 150, 300, 520, 800])
def test_a_full_disk_keeps_what_was_saved_and_goes_on_when_there_is_space(
    place: Path, disk: Path, undisturbed: Outcome, kilobytes: int
) -> None:
    assert mount(disk, f"remount,size={kilobytes}k")
    full = run_trainer(place / "tiny.yaml", disk / "run")
    assert full.code == 2
    (message,) = [line for line in full.err.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in message
    assert "Traceback" not in full.err
    kept = check_kept(disk / "run")
    assert (kept == 0) == (kilobytes < 200)
    assert kept < 8
    assert mount(disk, "remount,size=100m")
    resumed = run_trainer(place / "tiny.yaml", disk / "run", "--resume")
    assert resumed.code == 0, resumed.err
    assert ("starting from the beginning" in resumed.err) == (kept == 0)
    assert resumed.lines == undisturbed.lines
    assert resumed.weights_sha256 == undisturbed.weights_sha256


@pytest.mark.launch
def test_a_full_disk_ends_both_processes_with_one_message(place: Path, disk: Path) -> None:
    assert mount(disk, "remount,size=300k")
    with Launched(launcher(2), place, "tiny.yaml", str(disk / "run")) as run:
        outcome = run.ended()
    assert outcome.code == 1
    assert outcome.err.count("No space left on device") == 1, outcome.err
    assert "accel_trainer/" not in outcome.err
    assert check_kept(disk / "run") > 0
    path, complaints = newest_sound(disk / "run" / "checkpoints")
    assert path is not None
    assert not complaints


def test_a_read_only_disk(place: Path, disk: Path, undisturbed: Outcome) -> None:
    shutil.copytree(undisturbed.folder, disk / "run")
    assert mount(disk, "remount,ro")
    for arguments in ([], ["--resume"]):
        for folder in (disk / "run", disk / "new" / "run"):
            outcome = run_trainer(place / "tiny.yaml", folder, *arguments)
            assert outcome.code == 2
            assert f"--output_dir {folder}: Read-only file system; choose a folder that you may write" in outcome.err
            assert "Traceback" not in outcome.err

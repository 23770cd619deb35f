"""The output folder: small files replaced at once, metrics cut back, a status that is true however a run ends."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from accel_trainer import run_folder
from accel_trainer.errors import Interrupted, RunFolderError, TrainingFailed, UserError
from accel_trainer.run_folder import RunFolder, opened, watched, write_json, write_text
from accel_trainer.writing import committed


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_json_keeps_text_and_turns_what_json_lacks_into_null(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": float("nan"), "b": [float("inf"), -float("inf"), 1.5], "面": ("x", True, None, 3)})
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == {"a": None, "b": [None, None, 1.5], "面": ["x", True, None, 3]}
    assert "面" in text
    assert "NaN" not in text


def test_a_failed_replacement_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "old")

    def full(self: Path, *_: Any, **__: Any) -> int:
        with self.open("w") as file:
            file.write("ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunFolderError, match=r"cannot write .*x\.txt: No space left on device"):
        write_text(path, "half")
    assert path.read_text() == "old"


def test_metrics_are_appended_and_cut(folder: RunFolder) -> None:
    folder.cut_metrics(3, 3)
    assert not folder.metrics.exists()
    lines: list[dict[str, Any]] = [{"step": step, "loss": 1 / step} for step in range(1, 6)]
    lines.insert(3, {"step": 3, "split": "validation", "f1": 0.5})
    for line in lines:
        folder.append_metrics(line)
    with folder.metrics.open("a") as file:
        file.write('{"step": 2, "lo')  # a killed process's last words
    folder.cut_metrics(3, 3)
    assert [json.loads(text) for text in folder.metrics.read_text().splitlines()] == lines[:4]
    folder.cut_metrics(3, 2)  # the evaluation after step 3 is to be made up for
    assert [json.loads(text) for text in folder.metrics.read_text().splitlines()] == lines[:3]
    folder.append_metrics({"step": 4, "loss": float("nan")})
    assert json.loads(folder.metrics.read_text().splitlines()[-1]) == {"step": 4, "loss": None}
    folder.cut_metrics(0, 0)
    assert folder.metrics.read_text() == ""


def test_predictions_are_one_line_per_row(folder: RunFolder) -> None:
    path = folder.write_predictions("test", ({"row": i, "text": "面\n"} for i in range(3)))
    assert path == folder.path / "predictions" / "test.jsonl"
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        {"row": i, "text": "面\n"} for i in range(3)
    ]


def open_and_close(folder: RunFolder, *, resume: bool) -> None:
    with opened(folder, resume=resume):
        pass


def test_opening(folder: RunFolder) -> None:
    open_and_close(folder, resume=False)
    assert folder.path.is_dir()
    assert not folder.holds_a_run
    open_and_close(folder, resume=False)  # an empty folder is free
    folder.set_status("failed", 0)
    open_and_close(folder, resume=False)  # so is one where a mistake was found before the first step
    folder.set_status("interrupted", 4)
    folder.append_metrics({"step": 1})
    with pytest.raises(RunFolderError, match=r"a run lies there already \(interrupted\); continue it with --resume"):
        open_and_close(folder, resume=False)
    open_and_close(folder, resume=True)


def test_checkpoints_alone_are_a_run(folder: RunFolder) -> None:
    folder.checkpoints.mkdir(parents=True)
    with pytest.raises(RunFolderError, match=r"\(unknown\)"):
        open_and_close(folder, resume=False)


def test_opening_puts_back_what_was_laid_aside(folder: RunFolder) -> None:
    for name in (".best.old", ".model.old"):
        (folder.path / name).mkdir(parents=True)
    open_and_close(folder, resume=True)
    assert folder.best.is_dir()
    assert folder.model.is_dir()


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"--output_dir .*file"):
        open_and_close(RunFolder(tmp_path / "file"), resume=False)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_place_that_cannot_be_locked_cannot_be_written(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(
        RunFolderError, match=rf"--output_dir .*: {os.strerror(number)}; choose a folder that you may write"
    ):
        open_and_close(folder, resume=False)


@pytest.mark.parametrize("error", [NotImplementedError("flock"), OSError(errno.ENOLCK, "No locks available")])
def test_a_file_system_without_locks_is_used_with_a_warning(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    told: list[str] = []
    monkeypatch.setattr(FileLock, "acquire", refuse)
    monkeypatch.setattr(run_folder.logger, "warning", lambda message, *values: told.append(message % values))
    open_and_close(folder, resume=False)
    (warning,) = told
    assert "cannot be locked" in warning


LOCKING = """
import sys
from pathlib import Path
from accel_trainer.run_folder import RunFolder, opened

with opened(RunFolder(Path(sys.argv[1])), resume=True):
    print("inside", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("resume", [True, False])
def test_another_launch_is_kept_out_until_the_first_has_died(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    monkeypatch.setattr(run_folder, "LET_GO", 0.2)
    command = [sys.executable, "-c", LOCKING, str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "inside\n"
        folder.set_status("running", 3)
        for _ in range(2):  # a refused launch does not let go of what the other holds
            with pytest.raises(RunFolderError, match="another launch is at work in this folder"):
                open_and_close(folder, resume=resume)
        folder.note_mistake(UserError("of the second launch"), resume=True)
        assert folder.status()["state"] == "running"
        other.kill()
        other.wait()
    open_and_close(folder, resume=resume)  # the system let go
    folder.note_mistake(UserError("of a later launch"), resume=True)
    assert folder.status() == {"state": "failed", "exit_code": 2, "step": 3, "reason": "of a later launch"}


def test_a_resumed_run_waits_for_one_that_is_ending(folder: RunFolder) -> None:
    inside, leaving = threading.Event(), threading.Event()

    def ending() -> None:
        with opened(RunFolder(folder.path), resume=False):
            inside.set()
            leaving.wait(60)

    first = threading.Thread(target=ending)
    first.start()
    assert inside.wait(60)
    later = threading.Timer(0.5, leaving.set)
    later.start()
    with opened(folder, resume=True):
        assert leaving.is_set()
    first.join()


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
@pytest.mark.parametrize("count", ["0", "1", None])
def test_one_that_is_started_again_waits_for_a_machine_that_died(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, variable: str, count: str | None
) -> None:
    waited: list[float] = []

    @contextmanager
    def locked(patience: float) -> Iterator[None]:
        waited.append(patience)
        folder.path.mkdir(exist_ok=True)
        yield

    if count is not None:
        monkeypatch.setenv(variable, count)
    monkeypatch.setattr(folder, "locked", locked)
    open_and_close(folder, resume=True)
    open_and_close(folder, resume=False)
    assert waited == [120.0 if count == "1" else 10.0, 0.0]


def test_a_launch_that_stood_still_touches_nothing_of_the_one_that_took_over(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the file server takes the lock from a machine that is paused, which then goes on."""
    monkeypatch.setattr(RunFolder, "locked", lambda *arguments: nullcontext())
    folder.path.mkdir()
    later = RunFolder(folder.path)
    with opened(folder, resume=True):
        folder.set_status("running", 4)
        with opened(later, resume=True):
            later.set_status("running", 500)
            later.append_metrics({"step": 500})
            for touch in (folder.check_held, lambda: folder.append_metrics({"step": 5})):
                with pytest.raises(TrainingFailed, match="another launch has taken the run over"):
                    touch()
            folder.set_status("failed", 4, 1, "woke up, and the others are gone")
        assert later.status()["step"] == 500
        folder.set_status("failed", 4, 1, "even after that one's end")
    assert later.status()["step"] == 500
    assert [json.loads(line) for line in folder.metrics.read_text().splitlines()] == [{"step": 500}]
    assert not list(folder.path.glob(".launch"))


def test_what_killed_processes_left_is_swept(folder: RunFolder) -> None:
    for place in (folder.path, folder.checkpoints, folder.predictions):
        (place / ".checkpoint-4.writing").mkdir(parents=True)
        (place / ".status.json.123.writing").write_text("{")
    folder.not_finite.write_text("{}")
    open_and_close(folder, resume=True)
    left = sorted(str(path.relative_to(folder.path)) for path in folder.path.rglob("*"))
    assert left == [".lock", "checkpoints", "predictions"]


def test_status_of_a_broken_file_is_empty(folder: RunFolder) -> None:
    assert folder.status() == {}
    folder.path.mkdir()
    (folder.path / "status.json").write_text("{half")
    assert folder.status() == {}


def test_facts_and_scores(folder: RunFolder) -> None:
    assert (folder.facts(), folder.scores()) == ({}, {})  # of a run that has not come so far
    write_json(folder.run, {"started_at": "2026-01-31", "recipe": None, "hardware": {"num_processes": 1}})
    write_json(folder.results, {"train": {"steps": 3}, "test": {"f1": 0.5}})
    assert folder.facts() == {"started_at": "2026-01-31", "recipe": None, "hardware": {"num_processes": 1}}
    assert folder.scores() == {"train": {"steps": 3}, "test": {"f1": 0.5}}


@pytest.mark.parametrize("text", [b"", b"{half", b"\xff", b"[]", b"null", b"3", b"[" * 100_000])
def test_files_that_no_run_leaves(folder: RunFolder, text: bytes) -> None:
    folder.path.mkdir()
    for path, read in ((folder.run, folder.facts), (folder.results, folder.scores)):
        path.write_bytes(text)
        with pytest.raises(RunFolderError, match=rf"{path}: it .*; name another run, or train again"):
            read()


def test_files_with_other_entries_than_a_run_leaves(folder: RunFolder) -> None:
    for name in ("hardware", "versions", "recipe"):
        write_json(folder.run, {name: "x"})
        with pytest.raises(RunFolderError, match=r"run\.json: it is not what a run leaves"):
            folder.facts()
    write_json(folder.results, {"train": {}, "test": 3})
    with pytest.raises(RunFolderError, match=r"results\.json: it is not what a run leaves"):
        folder.scores()
    folder.results.unlink()
    folder.results.mkdir()
    with pytest.raises(RunFolderError, match=r"results\.json: it cannot be read \(Is a directory\)"):
        folder.scores()


ENDS: dict[str, tuple[BaseException | None, dict[str, Any]]] = {
    "done": (None, {"state": "done", "exit_code": 0, "reason": None}),
    "mistake": (UserError("bad"), {"state": "failed", "exit_code": 2, "reason": "bad"}),
    "failed": (TrainingFailed("nan"), {"state": "failed", "exit_code": 1, "reason": "TrainingFailed: nan"}),
    "unforeseen": (ValueError("odd"), {"state": "failed", "exit_code": 1, "reason": "ValueError: odd"}),
    "keyboard": (KeyboardInterrupt(), {"state": "failed", "exit_code": 1, "reason": "KeyboardInterrupt: "}),
    "interrupted": (Interrupted("later"), {"state": "interrupted", "exit_code": 75, "reason": "later"}),
}


@pytest.mark.parametrize("end", ENDS)
def test_status_is_true_however_the_run_ends(folder: RunFolder, end: str) -> None:
    error, expected = ENDS[end]

    def block() -> None:
        with watched(folder, is_main_process=True) as watch:
            assert folder.status() == {"state": "running", "exit_code": None, "step": 0, "reason": None}
            watch.steps_done = lambda: 7
            if error is not None:
                raise error

    if error is None:
        block()
    else:
        with pytest.raises(type(error)):
            block()
    assert folder.status() == {**expected, "step": 7}


def test_only_the_main_process_writes_status(folder: RunFolder) -> None:
    with watched(folder, is_main_process=False):
        pass
    assert not folder.path.exists()


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_process_that_does_not_share_the_folder_neither_reads_nor_writes_it(
    folder: RunFolder, is_shared: bool
) -> None:
    folder.is_shared = is_shared
    folder.set_status("running", 4)  # of an earlier launch, where this machine was the first
    with pytest.raises(TrainingFailed), watched(folder, is_main_process=False) as watch:
        assert watch.steps_done() == (4 if is_shared else 0)
        raise TrainingFailed("nan")
    assert folder.status()["state"] == ("failed" if is_shared else "running")


def test_a_mark_is_seen_while_it_lasts_and_swept_when_it_is_left(folder: RunFolder) -> None:
    folder.path.mkdir()
    with folder.marked("abc"):
        assert folder.sees("abc")
        assert not RunFolder(folder.path.parent / "another").sees("abc")
        assert not folder.sees("abd")
        left = [path.name for path in folder.path.iterdir()]
    assert not folder.sees("abc")
    (folder.path / left[0]).touch()
    open_and_close(folder, resume=True)
    assert [path.name for path in folder.path.iterdir()] == [".lock"]


@pytest.mark.parametrize("end", [end for end in ENDS if end not in ("done", "interrupted")])
def test_an_error_is_not_hidden_by_the_full_disk_it_came_from(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    error, _ = ENDS[end]
    assert error is not None

    def block() -> None:
        with watched(folder, is_main_process=True):
            monkeypatch.setattr(RunFolder, "set_status", full)
            raise error

    with pytest.raises(type(error)) as caught:
        block()
    assert caught.value is error


def full(*_: Any, **__: Any) -> None:
    raise RunFolderError("cannot write status.json: No space left on device")


def test_a_mistake_is_noted_where_it_was_made(folder: RunFolder) -> None:
    folder.note_mistake(UserError("bad key"), resume=False)
    assert folder.status() == {"state": "failed", "exit_code": 2, "step": 0, "reason": "bad key"}
    folder.note_mistake(UserError("bad value"), resume=False)  # a folder with nothing but a mistake is free
    assert folder.status()["reason"] == "bad value"
    folder.set_status("interrupted", 4, 75, "stopped")
    folder.append_metrics({"step": 1})
    folder.note_mistake(UserError("not this run's"), resume=False)
    assert folder.status()["reason"] == "stopped"
    folder.note_mistake(UserError("this run's"), resume=True)
    assert folder.status() == {"state": "failed", "exit_code": 2, "step": 4, "reason": "this run's"}
    folder.set_status("running", 5)  # of a process that was killed
    folder.note_mistake(UserError("of a launch after it"), resume=True)
    assert folder.status()["reason"] == "of a launch after it"
    folder.set_status("done", 5)
    folder.note_mistake(UserError("of a launch after the end"), resume=True)
    assert folder.status()["state"] == "done"


def test_a_mistake_that_cannot_be_noted_is_still_told(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "set_status", full)
    folder.note_mistake(UserError("bad key"), resume=False)


def test_the_step_of_weights(folder: RunFolder) -> None:
    assert folder.weights_step(folder.best) is None
    with committed(folder.best) as writing:
        (writing / "training.json").write_text('{"step": 12}')
        (writing / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"{}      ")  # no tensors
    assert folder.weights_step(folder.best) == 12
    (folder.best / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"     {} ")
    assert folder.weights_step(folder.best) is None
    with committed(folder.best) as writing:
        (writing / "training.json").write_text("{}")
        (writing / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"{}      ")
    assert folder.weights_step(folder.best) is None


def test_the_best_of_before_lies_beside_the_best(folder: RunFolder) -> None:
    assert folder.best_before == folder.path / ".best-before"
    folder.best_before.mkdir(parents=True)
    assert not folder.holds_a_run


def test_a_folder_of_recipes_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {}")
    with (
        pytest.raises(RunFolderError, match="recipes or configs stand there"),
        opened(RunFolder(tmp_path), resume=False),
    ):
        pass
    (tmp_path / "mine.yaml").rename(tmp_path / "mine.txt")
    with opened(RunFolder(tmp_path), resume=False):
        pass


def test_a_run_that_nobody_holds_any_more_was_killed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_metrics({"step": 1})
    folder.set_status("running", 1)
    with pytest.raises(RunFolderError, match=r"a run lies there already \(killed\)"), opened(folder, resume=False):
        pass

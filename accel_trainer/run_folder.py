"""The output folder of a run: its names, and how each file in it is written.

recipe.yaml  run.json  status.json  metrics.jsonl  results.json
token_budget.json (from an out-of-memory of one of several processes to the next checkpoint)
checkpoints/  best/  model/  predictions/
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from accel_trainer.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    AccelTrainerError,
    Interrupted,
    RunFolderError,
    TrainingFailed,
    UserError,
)
from accel_trainer.writing import damage, replaced, restore_interrupted

State = Literal["running", "done", "interrupted", "failed"]


def write_text(path: Path, text: str) -> None:
    """Replace a file at once, so that a reader sees the old or the new text and never half of one."""
    try:
        with replaced(path) as writing:
            writing.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(
            f"cannot write {path}: {error.strerror or error}; make space, or choose another --output_dir"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file at once; numbers that are not finite become null, which JSON readers understand."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


class RunFolder:
    """Paths of a run, and its small files. Only the main process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.run = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.results = path / "results.json"
        self.checkpoints = path / "checkpoints"
        self.best = path / "best"
        self.best_before = path / ".best-before"  # what the last checkpoint calls best, until the next one is written
        self.model = path / "model"
        self.predictions = path / "predictions"
        self._status = path / "status.json"
        self._token_budget = path / "token_budget.json"

    @property
    def holds_a_run(self) -> bool:
        """Whether a run got as far here as to leave something worth keeping."""
        return any(path.exists() for path in (self.metrics, self.checkpoints, self.best, self.model))

    def status(self) -> dict[str, Any]:
        """What status.json says; empty if there is none or it cannot be read."""
        try:
            status: dict[str, Any] = json.loads(self._status.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return status

    def set_status(self, state: State, step: int, exit_code: int | None = None, reason: str | None = None) -> None:
        """Say how the run stands, for whoever watches it from outside."""
        write_json(self._status, {"state": state, "exit_code": exit_code, "step": step, "reason": reason})

    def token_budget(self) -> int | None:
        """Tokens of a micro-batch that a process out of memory asked for; None if none did."""
        try:
            found: int = json.loads(self._token_budget.read_text(encoding="utf-8"))["max_tokens_per_device"]
        except (OSError, ValueError, KeyError):
            return None
        return found

    def set_token_budget(self, max_tokens: int) -> None:
        """Ask for micro-batches of so many tokens when the run goes on. Any process may; the smallest counts."""
        write_json(self._token_budget, {"max_tokens_per_device": min(max_tokens, self.token_budget() or max_tokens)})

    def forget_token_budget(self) -> None:
        """What was asked for is in force, and in the checkpoint from now on."""
        self._token_budget.unlink(missing_ok=True)

    def weights_step(self, folder: Path) -> int | None:
        """Optimizer step of the weights in `best/` or its like; None if there are none or they are damaged."""
        if damage(folder) is not None:
            return None
        facts: dict[str, int] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        return facts["step"]

    def note_mistake(self, error: UserError, *, resume: bool) -> None:
        """Say in status.json that a launch ended in a mistake, unless the folder is another run's or a live one's."""
        if (resume or not self.holds_a_run) and self.status().get("state") not in ("running", "done"):
            with suppress(RunFolderError):
                self.set_status("failed", self.status().get("step") or 0, error.exit_code, str(error))

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(line), ensure_ascii=False) + "\n")
        except OSError as error:
            raise RunFolderError(
                f"cannot write {self.metrics}: {error.strerror or error}; make space, then --resume"
            ) from error

    def cut_metrics(self, step: int) -> None:
        """Drop the lines after `step`, and a last line that a killed process left unfinished."""
        if not self.metrics.exists():
            return
        kept = []
        for text in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(text)["step"] <= step:
                    kept.append(text)
            except (ValueError, KeyError, TypeError):
                continue
        write_text(self.metrics, "".join(f"{text}\n" for text in kept))

    def write_predictions(self, split: str, rows: Iterable[dict[str, Any]]) -> Path:
        """Write one line of JSON per row of an evaluated split, and give its path."""
        path = self.predictions / f"{split}.jsonl"
        try:
            with replaced(path) as writing, writing.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise RunFolderError(
                f"cannot write {path}: {error.strerror or error}; make space, then --resume"
            ) from error
        return path


def open_run_folder(folder: RunFolder, *, resume: bool) -> None:
    """Make the folder if need be, see that it is free to use, and put back what a killed process laid aside.

    Raises:
        RunFolderError: another run lies there and is not to be resumed, or the folder cannot be written.
    """
    path = folder.path
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"--output_dir {path}: {error.strerror or error}; choose a folder that you may write"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise RunFolderError(f"--output_dir {path}: the folder is read-only; choose one that you may write")
    if folder.holds_a_run and not resume:
        state = folder.status().get("state", "unknown")
        raise RunFolderError(
            f"--output_dir {path}: a run lies there already ({state}); continue it with --resume, or choose another folder"
        )
    if not resume:
        folder.forget_token_budget()
    restore_interrupted(folder.best)
    restore_interrupted(folder.model)


class Watch:
    """Where `watched` asks how far the run is."""

    def __init__(self, step: int) -> None:
        self.steps_done: Callable[[], int] = lambda: step


@contextmanager
def watched(folder: RunFolder, is_main_process: bool) -> Iterator[Watch]:
    """Keep status.json true for whoever watches from outside, however the block ends."""
    watch = Watch(folder.status().get("step") or 0)  # of the run that is resumed, until its checkpoint is read

    def report(state: State, code: int | None = None, reason: str | None = None) -> None:
        if is_main_process:
            folder.set_status(state, watch.steps_done(), code, reason)

    report("running")
    try:
        yield watch
    except Interrupted as error:
        if folder.status().get("state") != "failed":  # another process failed, and the launcher ends the others
            report("interrupted", error.exit_code, str(error))
        raise
    except BaseException as error:
        told = folder.status()
        if isinstance(error, RuntimeError) and told.get("state") == "failed":
            # Another process has said why; this one's collective broke because of it.
            raise TrainingFailed(told["reason"]) from error
        code = error.exit_code if isinstance(error, AccelTrainerError) else EXIT_FAILED
        with suppress(RunFolderError):  # a full disk has been told already, by the error itself
            report("failed", code, f"{type(error).__name__}: {error}")
        raise
    report("done", EXIT_DONE)

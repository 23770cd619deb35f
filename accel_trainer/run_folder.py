"""The output folder of a run: its names, and how each file in it is written.

recipe.yaml  run.json  status.json  metrics.jsonl  results.json
token_budget.json (from an out-of-memory of one of several processes to the next checkpoint)
not_finite.json (after a loss that was no number, until the run goes on)
checkpoints/  best/  model/  predictions/
.lock .launch (held, and whose it is, while a run is going on)
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from filelock import FileLock, Timeout

from accel_trainer.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    AccelTrainerError,
    Interrupted,
    ProcessLost,
    RunFolderError,
    TrainingFailed,
    UserError,
)
from accel_trainer.redaction import without_secrets
from accel_trainer.signals import handling
from accel_trainer.writing import damage, replaced, sweep

State = Literal["running", "done", "interrupted", "failed"]
LET_GO = 10.0  # seconds that a resumed run waits for one that is being stopped
# Seconds that one waits which a scheduler started again: a file server holds the lock of a machine that died for it (90, NFS 4).
LET_GO_OF_A_MACHINE = 120.0
LAST_WORDS = 2.0  # seconds that a process waits for the one it lost to tell why

logger = logging.getLogger("accel_trainer")


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


_NOT_OF_A_RUN = "{}: it is not what a run leaves; name another run, or train again"


def _read_object(path: Path) -> dict[str, Any]:
    """A file of a run; empty if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):  # of a run that has not come so far
        return {}
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise RunFolderError(f"{path}: it cannot be read ({reason}); name another run, or train again") from error
    if not isinstance(value, dict):
        raise RunFolderError(_NOT_OF_A_RUN.format(path))
    return value


class RunFolder:
    """Paths of a run, and its small files. Only the main process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_shared = True  # whether this process sees what the main process writes; asked for when they have met
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
        self.not_finite = path / "not_finite.json"
        # Of the system alone: nobody would release another kind that a killed process left.
        self._lock = FileLock(path / ".lock", fallback_to_soft=False)
        self._holder = path / ".launch"
        self._launch: str | None = None  # a name of this launch, while it holds the folder

    @property
    def holds_a_run(self) -> bool:
        """Whether a run got as far here as to leave something worth keeping."""
        return any(path.exists() for path in (self.metrics, self.checkpoints, self.best, self.model))

    @contextmanager
    def marked(self, mark: str) -> Iterator[None]:
        """Let a mark lie in the folder while the block lasts, which `sees` finds on machines that share its storage."""
        path = self._mark(mark)
        path.touch()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def sees(self, mark: str) -> bool:
        """Whether a mark lies in the folder."""
        return self._mark(mark).exists()

    def _mark(self, mark: str) -> Path:
        return self.path / f".{mark}.writing"  # which the next start sweeps away, should this process be killed

    @contextmanager
    def locked(self, patience: float = 0.0) -> Iterator[None]:
        """Keep every other launch out of the folder while the block lasts; the system lets go when this process dies.

        Args:
            patience: seconds to wait for a launch that is about to end.

        Raises:
            RunFolderError: another launch is at work there, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=patience)
        except Timeout:
            raise RunFolderError(
                f"--output_dir {self.path}: another launch is at work in this folder; wait for it, stop it, or choose another "
                "folder"
            ) from None
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise RunFolderError(
                    f"--output_dir {self.path}: {error.strerror or error}; choose a folder that you may write"
                ) from error
            logger.warning("note: %s cannot be locked; take care that no other launch uses it", self.path)
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Have the folder know this launch while the block lasts, so that no later one is written over.

        A machine that stands still for so long that the file server gives its lock to another launch may wake up.
        """
        self._launch = uuid4().hex
        write_text(self._holder, self._launch)
        try:
            yield
        finally:
            if self.is_held:
                self._holder.unlink(missing_ok=True)
            self._launch = None

    @property
    def is_held(self) -> bool:
        """Whether no later launch has taken the folder over."""
        try:
            return self._launch is None or self._holder.read_text(encoding="utf-8") == self._launch
        except OSError:
            return False

    def check_held(self) -> None:
        """See that no later launch has taken the folder over.

        Raises:
            TrainingFailed: one has.
        """
        if not self.is_held:
            raise TrainingFailed(
                f"{self.path}: another launch has taken the run over while this one stood still; it goes on"
            )

    def status(self) -> dict[str, Any]:
        """What status.json says; empty if there is none or it cannot be read."""
        try:
            status = json.loads(self._status.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return status if isinstance(status, dict) else {}

    def facts(self) -> dict[str, Any]:
        """What run.json says; empty if there is none.

        Raises:
            RunFolderError: it cannot be read, or is not what a run leaves.
        """
        facts = _read_object(self.run)
        mappings = (facts.get(name) for name in ("hardware", "versions", "recipe"))
        if not all(isinstance(value, dict | None) for value in mappings):
            raise RunFolderError(_NOT_OF_A_RUN.format(self.run))
        return facts

    def scores(self) -> dict[str, dict[str, Any]]:
        """What results.json says, by role, with the numbers of the training itself under `train`; empty if there is none.

        Raises:
            RunFolderError: it cannot be read, or is not what a run leaves.
        """
        scores = _read_object(self.results)
        if not all(isinstance(values, dict) for values in scores.values()):
            raise RunFolderError(_NOT_OF_A_RUN.format(self.results))
        return scores

    def set_status(self, state: State, step: int, exit_code: int | None = None, reason: str | None = None) -> None:
        """Say how the run stands, for whoever watches it from outside."""
        if not self.is_held:
            return  # it is about another launch by now
        told = None if reason is None else without_secrets(reason)
        write_json(self._status, {"state": state, "exit_code": exit_code, "step": step, "reason": told})

    def token_budget(self) -> int | None:
        """Tokens of a micro-batch that a process out of memory asked for; None if none did."""
        try:
            found = int(json.loads(self._token_budget.read_text(encoding="utf-8"))["max_tokens_per_device"])
        except (OSError, ValueError, KeyError, TypeError):
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
        if damage(folder, ("model.safetensors", "training.json")) is not None:
            return None
        try:
            step: int = json.loads((folder / "training.json").read_text(encoding="utf-8"))["step"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return step

    def note_mistake(self, error: UserError, *, resume: bool) -> None:
        """Say in status.json that a launch ended in a mistake, unless the folder is another run's or a live one's."""
        with suppress(RunFolderError):
            if not resume and self.holds_a_run:
                return
            with self.locked():
                told = self.status()
                if told.get("state") != "done" and str(error) not in (told.get("reason") or ""):
                    self.set_status("failed", told.get("step") or 0, error.exit_code, str(error))

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl.

        Raises:
            RunFolderError: the disk is full.
            TrainingFailed: another launch has taken the folder over.
        """
        self.check_held()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(line), ensure_ascii=False) + "\n")
        except OSError as error:
            raise RunFolderError(
                f"cannot write {self.metrics}: {error.strerror or error}; make space, then --resume"
            ) from error

    def cut_metrics(self, step: int, evaluated_step: int) -> None:
        """Drop the lines after `step`, evaluations after `evaluated_step`, and a last line that a killed process left unfinished."""
        if not self.metrics.exists():
            return
        kept = []
        for text in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if "\ufffd" in text:
                    continue
                line = json.loads(text)
                if line["step"] <= (evaluated_step if "split" in line else step):
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


@contextmanager
def opened(folder: RunFolder, *, resume: bool) -> Iterator[None]:
    """Make the folder if need be, see that it is free to use, tidy up after killed processes, and keep others out.

    Raises:
        RunFolderError: another run lies there and is not to be resumed, another launch is at work there, or the folder
            cannot be written.
    """
    # A launch that was asked to stop may still be saving when the next one is submitted.
    started_again = any(
        int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    )
    patience = LET_GO_OF_A_MACHINE if started_again else LET_GO
    with folder.locked(patience if resume else 0.0):
        if folder.holds_a_run and not resume:
            state = folder.status().get("state", "unknown")
            state = "killed" if state == "running" else state  # nobody holds the lock
            raise RunFolderError(
                f"--output_dir {folder.path}: a run lies there already ({state}); continue it with --resume, or choose "
                "another folder"
            )
        if not resume and not folder.status() and any(folder.path.glob("*.y*ml")):
            raise RunFolderError(
                f"--output_dir {folder.path}: recipes or configs stand there, among which a run would put its own files; choose "
                f"another folder, such as runs/{folder.path.name}"
            )
        if not resume:
            folder.forget_token_budget()
        folder.not_finite.unlink(missing_ok=True)
        sweep(folder.path, folder.checkpoints, folder.predictions)
        with folder.held():
            yield


class Watch:
    """Where `watched` asks how far the run is."""

    def __init__(self, step: int) -> None:
        self.steps_done: Callable[[], int] = lambda: step


@contextmanager
def watched(folder: RunFolder, is_main_process: bool) -> Iterator[Watch]:
    """Keep status.json true for whoever watches from outside, however the block ends.

    The main process writes it. Another one does where it is the first to end: the main process may then see no more than
    a connection that breaks.

    Raises:
        Interrupted, TrainingFailed: in the place of `ProcessLost`, where the other process told why it went.
    """
    has_status = is_main_process or folder.is_shared
    # Of the run that is resumed, until its checkpoint is read.
    watch = Watch(folder.status().get("step") or 0 if has_status else 0)

    def report(state: State, code: int | None = None, reason: str | None = None) -> None:
        if is_main_process or (folder.is_shared and folder.status().get("state") == "running"):
            folder.set_status(state, watch.steps_done(), code, reason)

    with handling(
        signal.SIG_IGN
    ):  # outside of what listens in the block: a launcher ends the others when one has ended
        if is_main_process:
            report("running")
        try:
            yield watch
        except BaseException as error:
            ended = error
            if isinstance(error, ProcessLost) and has_status:
                told = _last_words(folder)
                if told.get("state") == "interrupted":
                    ended = Interrupted(told["reason"])
                elif told.get("state") == "failed":
                    ended = TrainingFailed(told["reason"])
            elif isinstance(error, Interrupted) and has_status and folder.status().get("state") == "failed":
                raise  # another process failed, and the launcher ended this one
            if isinstance(ended, Interrupted):
                report("interrupted", ended.exit_code, str(ended))
            else:
                code = ended.exit_code if isinstance(ended, AccelTrainerError) else EXIT_FAILED
                # A mistake is told in the user's words; and what another process told has its name.
                named = not isinstance(ended, UserError) and (type(ended) is not TrainingFailed or ended is error)
                with suppress(RunFolderError):  # a full disk has been told already, by the error itself
                    report("failed", code, f"{type(ended).__name__}: {ended}" if named else str(ended))
            if ended is not error:
                raise ended from error
            raise
        if is_main_process:
            report("done", EXIT_DONE)


def _last_words(folder: RunFolder) -> dict[str, Any]:
    """The status, once a process that ended has told why, or had the time to."""
    end = time.monotonic() + LAST_WORDS
    while folder.status().get("state") == "running" and time.monotonic() < end:
        time.sleep(0.05)
    return folder.status()

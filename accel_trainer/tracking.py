"""What a run says while it goes on: a bar where there is a terminal, lines where there is none; and its trackers.

A tracker that fails is told of once and left out from then on: no training stops because a service is down.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
from accelerate import Accelerator
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from accel_trainer.redaction import without_secrets
from accel_trainer.terminal import Style, aligned, styled

logger = logging.getLogger("accel_trainer")


_quiet = threading.local()  # torch_xla may start processes of a run as threads of one


class _ThroughTheBar(logging.Handler):
    """Writes messages above a progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < getattr(_quiet, "below", logging.INFO):
            return
        style: Style = "yellow" if record.levelno >= logging.WARNING else ""
        tqdm.write(styled(without_secrets(self.format(record)), style, stderr=True), file=sys.stderr)


def speak_on(main_process: bool) -> None:
    """Let the main process say what it does, and the others only what is wrong."""
    logger.handlers = [_ThroughTheBar()]
    logger.propagate = False
    logger.setLevel(logging.INFO)
    _quiet.below = logging.INFO if main_process else logging.ERROR


@contextmanager
def heard() -> Iterator[None]:
    """Let this process warn in the block, whichever it is, of what it alone knows."""
    before = getattr(_quiet, "below", logging.INFO)
    _quiet.below = min(before, logging.WARNING)
    try:
        yield
    finally:
        _quiet.below = before


def quieten_libraries() -> None:
    """Leave the terminal to what this program has to say."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    # torch 2.13 announces another name for what Accelerate passes on.
    warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated", category=FutureWarning)


def clock(seconds: float) -> str:
    """Seconds as people write them: 0:07, 12:30, 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def print_scores(scores: dict[str, dict[str, float]]) -> None:
    """A table of scores: a row per split, a column per metric."""
    names = list(dict.fromkeys(name for values in scores.values() for name in values))
    rows = [
        [role, *(f"{values[name]:.4f}" if name in values else "" for name in names)] for role, values in scores.items()
    ]
    if names:
        print(f"\n{aligned([['', *names], *rows])}")


def start_trackers(accelerator: Accelerator, project_name: str, settings: dict[str, str]) -> None:
    """Open the trackers that the Accelerator was made with, each by itself, so that one that fails takes no other along."""
    started = []
    for wanted in list(accelerator.log_with):
        accelerator.log_with, accelerator.trackers = [wanted], []
        try:
            accelerator.init_trackers(project_name, config=settings)
        except Exception as error:  # each service has errors of its own
            logger.warning("%s", _failed(str(getattr(wanted, "value", wanted)), "start", error))
            close_trackers(accelerator)  # what of it did
            continue
        started += accelerator.trackers
    accelerator.trackers = started


def track(accelerator: Accelerator, values: dict[str, Any], step: int) -> None:
    """Give values of a step to every tracker."""
    for tracker in list(accelerator.trackers):
        try:
            tracker.log(values, step=step)
        except Exception as error:
            logger.warning("%s", _failed(tracker.name, "take what is logged", error))
            accelerator.trackers.remove(tracker)


def close_trackers(accelerator: Accelerator) -> None:
    """Let every tracker write what it holds back."""
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:
            logger.warning("%s", _failed(tracker.name, "finish", error))
    accelerator.trackers = []


def _failed(name: str, doing: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"tracking.report_to: {name} could not {doing} ({reason}); nothing stops for it, and metrics.jsonl has every line"


class Progress:
    """Progress of training on the main process; on the others, nothing."""

    def __init__(self, total_steps: int, done: int, *, main_process: bool) -> None:
        self._total, self._done, self._main = total_steps, done, main_process
        self._seconds, self._tokens = 0.0, 0  # of the steps since the last logged line
        self._all_seconds, self._started_at = 0.0, done
        self._last = time.perf_counter()
        self._bar = (
            tqdm(total=total_steps, initial=done, unit="step", desc="training", dynamic_ncols=True)
            if main_process and sys.stderr.isatty()
            else None
        )

    def step(self, tokens: int) -> None:
        """One more optimizer step is done, of that many real tokens."""
        now = time.perf_counter()
        self._seconds += now - self._last
        self._all_seconds += now - self._last
        self._last = now
        self._tokens += tokens
        self._done += 1
        if self._bar is not None:
            self._bar.update()

    def resume(self) -> None:
        """Leave the time since the last step out: it went into something else."""
        self._last = time.perf_counter()

    def log(self, line: dict[str, Any]) -> None:
        """Show a logged line: loss, learning rate, real tokens per second, time left."""
        rate = self._tokens / self._seconds if self._seconds else 0.0
        self._seconds, self._tokens = 0.0, 0
        if not self._main:
            return
        shown = {"loss": f"{line['loss']:.4f}", "lr": f"{line['learning_rate']:.2e}", "tokens/s": f"{rate:,.0f}"}
        if self._bar is not None:
            self._bar.set_postfix(shown)
            return
        left = self._all_seconds / max(1, self._done - self._started_at) * (self._total - self._done)
        values = "  ".join(f"{name} {value}" for name, value in shown.items())
        logger.info("step %d/%d  epoch %.2f  %s  left %s", self._done, self._total, line["epoch"], values, clock(left))

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.close()

"""What a run says while it goes on: a bar where there is a terminal, lines where there is none."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import datasets
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

logger = logging.getLogger("accel_trainer")


class _ThroughTheBar(logging.Handler):
    """Writes messages above a progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def speak_on(main_process: bool) -> None:
    """Let the main process say what it does, and the others only what is wrong."""
    logger.handlers = [_ThroughTheBar()]
    logger.propagate = False
    logger.setLevel(logging.INFO if main_process else logging.ERROR)


def quieten_libraries() -> None:
    """Leave the terminal to what this program has to say."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()


def clock(seconds: float) -> str:
    """Seconds as people write them: 0:07, 12:30, 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Progress of training on the main process; on the others, nothing."""

    def __init__(self, total_steps: int, done: int, *, main_process: bool) -> None:
        self._total, self._done, self._main = total_steps, done, main_process
        self._started, self._started_at = time.monotonic(), done
        self._bar = (
            tqdm(total=total_steps, initial=done, unit="step", desc="training", dynamic_ncols=True)
            if main_process and sys.stderr.isatty()
            else None
        )

    def step(self) -> None:
        """One more optimizer step is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()

    def log(self, line: dict[str, Any], tokens_per_second: float) -> None:
        """Show a logged line: loss, learning rate, gradient norm, real tokens per second, time left."""
        if not self._main:
            return
        shown = {
            "loss": f"{line['loss']:.4f}",
            "lr": f"{line['learning_rate']:.2e}",
            "tokens/s": f"{tokens_per_second:,.0f}",
        }
        if self._bar is not None:
            self._bar.set_postfix(shown)
            return
        done = max(1, self._done - self._started_at)
        left = (time.monotonic() - self._started) / done * (self._total - self._done)
        values = "  ".join(f"{name} {value}" for name, value in shown.items())
        logger.info("step %d/%d  epoch %.2f  %s  left %s", self._done, self._total, line["epoch"], values, clock(left))

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.close()

"""Fine-tune BERT-family encoders for text classification."""

import gc
import importlib
import os
from typing import Any

from accel_trainer.launcher import follow_launcher, leave_on_signals

leave_on_signals()
follow_launcher()

# Before torch is imported: threads that spin while they wait make every other job on the machine, and this one, many times
# slower (measured: three trainings on two cores, 49 s against 9 s). It changes no result.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# While the libraries are imported, the collector would walk their many objects again and again: a tenth of the time to the
# first step (measured). `hardware.start_accelerator` puts it back.
COLLECTION_THRESHOLD = gc.get_threshold()
gc.set_threshold(100_000, 50, 50)


__all__ = ["load_recipe", "predict", "train"]


def __getattr__(name: str) -> Any:
    """What is exported, imported when it is asked for: torch takes seconds."""
    if name == "load_recipe":
        return importlib.import_module("accel_trainer.api").load_recipe
    if name in ("train", "predict"):  # modules that can be called
        return importlib.import_module(f"accel_trainer.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

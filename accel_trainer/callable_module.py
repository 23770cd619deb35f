"""Modules that are functions too: `accel_trainer.train` is the file people run and fork, and what they call in a notebook."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        # By name, because `api` stands above the modules that are called so.
        function = getattr(importlib.import_module("accel_trainer.api"), self.__name__.rpartition(".")[2])
        return function(*arguments, **options)


def make_callable(name: str) -> None:
    """Let a call of the module of this name do what the function of its name in `accel_trainer.api` does."""
    module = sys.modules[name]
    module.__class__ = _Callable
    module.__qualname__ = name  # type: ignore[attr-defined]  # launchers of functions ask for it

"""The token budget is the user's, or what the device has memory for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import alone_on_the_cpu

from accel_trainer import device_memory, hardware
from accel_trainer.errors import (
    UserError,
)


@pytest.fixture(autouse=True)
def no_launch(tmp_path: Path) -> Iterator[None]:
    with alone_on_the_cpu(tmp_path / "cache"):
        yield


def test_budget_is_the_users_or_the_devices() -> None:
    accelerator = hardware.start_accelerator()
    assert device_memory.tokens_per_device(accelerator, (0, 1), 77) == 77
    assert device_memory.tokens_per_device(accelerator, (0, 1), None) == 4096
    assert device_memory.tokens_per_device(accelerator, (0, 1), 1) == 1
    assert device_memory.tokens_per_device(accelerator, (10**15, 1), None) == 512
    for given in (0, -5):
        with pytest.raises(UserError, match=rf"--max_tokens_per_device {given}: give a positive number"):
            device_memory.tokens_per_device(accelerator, (0, 1), given)

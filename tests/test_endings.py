"""A run that ends before its end says why."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from accelerate import Accelerator
from torch.distributed import HashStore

from accel_trainer import rendezvous
from accel_trainer.endings import heard_by_main
from accel_trainer.errors import (
    AccelTrainerError,
    Interrupted,
    ProcessLost,
    TrainingFailed,
    UserError,
)
from accel_trainer.run_folder import RunFolder

ENDS = [UserError("no such file"), Interrupted("by a signal"), TrainingFailed("no number"), ValueError("odd")]


@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_the_main_process_ends_as_the_one_that_it_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    monkeypatch.setattr(rendezvous, "_STORES", [HashStore()])
    folder = RunFolder(tmp_path)
    main, other = (cast(Accelerator, SimpleNamespace(is_main_process=is_main)) for is_main in (True, False))
    with pytest.raises(type(error)), heard_by_main(other, folder):
        raise error
    expected = type(error) if isinstance(error, AccelTrainerError) else TrainingFailed
    with pytest.raises(expected, match=str(error)) as caught, heard_by_main(main, folder):
        raise ProcessLost("another one")
    assert type(caught.value) is expected

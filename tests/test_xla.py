"""XLA's room, as far as it can be seen without torch_xla; tests/xla goes the whole way."""

from __future__ import annotations

import pytest
import torch

from accel_trainer import xla


def test_bytes_have_few_lengths() -> None:
    lengths = {len(xla.filled(torch.ones(size, dtype=torch.uint8), size)) for size in range(1, 5000)}
    assert lengths == {1024, 2048, 4096, 8192}
    assert xla.filled(torch.tensor([7, 8]), 3).tolist() == [7, 8, *[0] * 1022]


def test_other_devices_see_nothing_of_it() -> None:
    weight = torch.nn.Linear(1, 1)
    weight(torch.ones(1)).backward()
    before = weight.weight.grad
    xla.renew_gradients(weight)
    xla.end_graph(torch.device("cpu"))
    assert weight.weight.grad is before


@pytest.mark.parametrize("spawned", [True, False])
def test_a_launcher_of_functions_is_told_by_what_is_raised(monkeypatch: pytest.MonkeyPatch, spawned: bool) -> None:
    monkeypatch.setattr(xla, "is_spawned", lambda: spawned)
    assert xla.end_function(0) == 0
    if spawned:
        with pytest.raises(SystemExit) as ended:
            xla.end_function(75)
        assert ended.value.code == 75
    else:
        assert xla.end_function(75) == 75

"""What the processes of a run do together: mistakes told on all, values sent to the bit, lost ones named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from harness import OneOfMany, alone_on_the_cpu

from accel_trainer import collectives, hardware, xla
from accel_trainer.errors import (
    DataError,
    HardwareError,
    ProcessLost,
    UserError,
)


@pytest.fixture(autouse=True)
def no_launch(tmp_path: Path) -> Iterator[None]:
    with alone_on_the_cpu(tmp_path / "cache"):
        yield


def test_values_travel_as_text_on_tpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate's own `gather_object` raises there. The other process brings a longer text."""
    own, other = [None, "schön"], [{"step": 17, "reason": "another one is out of memory"}, 0.5]
    longer = json.dumps(other).encode()

    def gather(sent: torch.Tensor) -> torch.Tensor:
        if sent.dtype == torch.int64:
            return torch.cat([sent, torch.tensor([len(longer)])])
        return torch.cat([sent, xla.filled(torch.tensor(list(longer), dtype=torch.uint8), len(longer))])

    state = SimpleNamespace(distributed_type=DistributedType.XLA, device=torch.device("cpu"))
    monkeypatch.setattr(collectives, "PartialState", lambda: state)
    monkeypatch.setattr(xla, "PartialState", lambda: state)
    monkeypatch.setattr(xla, "gather", gather)
    assert collectives.gather_object(own) == [*own, *other]


def test_processes_that_torch_xla_starts_know_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no WORLD_SIZE."""
    for name in xla.BF16:
        monkeypatch.delenv(name, raising=False)  # and put back what is set here
    device = torch.device("xla")
    known = {"log_with": [], "device": device, "mixed_precision": "no", "native_amp": False}
    accelerator = SimpleNamespace(distributed_type=DistributedType.XLA, num_processes=8, **known)
    monkeypatch.setattr(hardware, "Accelerator", lambda **_: accelerator)
    assert hardware.start_accelerator() is accelerator


class Sum:
    """Process `index` of two, whose other process brings what was recorded of it."""

    device = torch.device("cpu")
    num_processes = 2

    def __init__(self, is_main: bool, others: Sequence[torch.Tensor] = ()) -> None:
        self.is_main_process, self.others = is_main, list(others)
        self.brought: list[torch.Tensor] = []

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        self.brought.append(tensor.clone())
        return tensor + self.others.pop(0) if self.others else tensor


@pytest.mark.parametrize("at_once", [2**26, 5])
def test_tensors_come_from_the_main_process_to_the_bit(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "SENT_AT_ONCE", at_once)
    tensors = {
        "floats": torch.tensor([[1.5, -0.0, float("nan")], [float("inf"), 1e-40, 3.0]]),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.tensor([0.1, 7.0], dtype=torch.bfloat16),
        "step": torch.tensor(12.0),
        "mask": torch.tensor([True, False]),
        "none": torch.zeros(0, 4),
    }
    first: Any = Sum(is_main=True)
    assert collectives.tensors_from_main_process(first, tensors).keys() == tensors.keys()
    second: Any = Sum(is_main=False, others=first.brought)
    found = collectives.tensors_from_main_process(second, None)
    assert second.others == []
    assert all(tensor.count_nonzero() == 0 for tensor in second.brought)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (found[name], tensor)))


@pytest.mark.parametrize("count", [1, 2])
def test_a_process_keeps_what_it_wants_of_them(count: int) -> None:
    main: Any = Sum(is_main=True)
    main.num_processes = count
    tensors = {"a": torch.arange(4.0), "b": torch.arange(6.0)}
    found = collectives.tensors_from_main_process(main, tensors, lambda name, tensor: tensor[: 1 + (name == "b")])
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a": [0.0], "b": [0.0, 1.0]}


@pytest.mark.parametrize("value", [None, 3, {"a": [1.5, "好"], "b": {"inf": float("inf")}}])
def test_a_value_comes_from_the_main_process(value: Any) -> None:
    first: Any = Sum(is_main=True)
    assert collectives.from_main_process(first, value) == value
    second: Any = Sum(is_main=False, others=first.brought)
    assert collectives.from_main_process(second, "left aside") == value


NCCL_SAYS = """NCCL error in: /pytorch/NCCLUtils.cpp:93, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.28.9
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 7000"""


@pytest.mark.parametrize(
    ("error", "named", "says"),
    [
        (
            RuntimeError(
                "[/x/gloo/transport/tcp/pair.cc:537] Read error [::1]:1: Connection reset by peer. This is typical"
            ),
            ProcessLost,
            r"lost another one, .* \(Read error \[::1\]:1: Connection reset by peer\)\. The last checkpoint is kept: .*--resume",
        ),
        (
            RuntimeError("Timed out waiting 4000ms for recv operation to complete"),
            ProcessLost,
            "Timed out waiting 4000ms",
        ),
        (torch.distributed.DistBackendError("watchdog"), ProcessLost, "watchdog"),
        (
            torch.distributed.DistBackendError(NCCL_SAYS),
            HardwareError,
            "talk to each other: Duplicate GPU detected : rank 1",
        ),
        (RuntimeError("could not load model 'igloo/bert'"), None, "igloo"),
        (ValueError("NCCL"), None, "NCCL"),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_lost_process_has_one_name(error: Exception, named: type[Exception] | None, says: str, count: int) -> None:
    expected = named if named is not None and count > 1 else type(error)
    process: Any = OneOfMany(0, count)
    with (
        pytest.raises(expected, match=None if count == 1 else says) as caught,
        collectives.lost_processes_named(process),
    ):
        raise error
    assert (caught.value is error) == (expected is type(error))


def test_a_file_that_cannot_be_had_is_a_mistake_of_all() -> None:
    process: Any = OneOfMany(0, 1)
    with (
        pytest.raises(UserError, match="/none/here: No such file or directory") as caught,
        collectives.together(process),
    ):
        Path("/none/here").read_text()
    assert isinstance(caught.value.__cause__, OSError)


def others_say(monkeypatch: pytest.MonkeyPatch, *messages: str | None) -> Any:
    """An accelerator with other processes, which say these messages after this one's."""
    monkeypatch.setattr(collectives, "gather_object", lambda own: [*own, *messages])
    return SimpleNamespace(num_processes=1 + len(messages))


def test_a_mistake_on_one_process_is_raised_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(UserError, match=r"^process 2: theirs$"),
        collectives.together(others_say(monkeypatch, None, "theirs")),
    ):
        pass
    with pytest.raises(DataError, match="mine"), collectives.together(others_say(monkeypatch, "theirs")):
        raise DataError("mine")
    with collectives.together(others_say(monkeypatch, None)):
        pass
    with pytest.raises(DataError, match="alone"), collectives.together(others_say(monkeypatch)):
        raise DataError("alone")


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_the_first_process_goes_first_and_frees_the_others(first: bool, fails: bool) -> None:
    events: list[str] = []
    fake: Any = SimpleNamespace(
        distributed_type=DistributedType.MULTI_CPU,
        is_local_main_process=first,
        wait_for_everyone=lambda: events.append("wait"),
    )

    def block() -> None:
        with collectives.first_process_first(fake):
            events.append("work")
            if fails:
                raise UserError("mistake")

    if fails:
        with pytest.raises(UserError):
            block()
    else:
        block()
    assert events == (["work", "wait"] if first else ["wait", "work"])


@pytest.mark.parametrize("in_a_group", [False, True])
def test_a_process_that_was_in_a_group_ends_without_freeing_it(in_a_group: bool) -> None:
    """Gloo aborts some processes of those that free it at their very end (torch 2.13)."""
    program = f"""
import atexit, sys
from accel_trainer import collectives

class Group:
    def __del__(self):
        print("freed", flush=True)

group = Group()
if {in_a_group}:
    collectives._GROUPS.append(group)
atexit.register(print, "at exit", end="")  # not flushed
collectives.end_process(75)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 75, ended.stderr
    assert ended.stdout == ("at exit" if in_a_group else "at exitfreed\n")

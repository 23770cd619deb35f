"""One Accelerator that does what the launcher meant, and a description that tells no secrets."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from harness import OneOfMany, alone_on_the_cpu
from torch.distributed import HashStore, Store

from accel_trainer import collectives, device_memory, hardware, rendezvous, xla
from accel_trainer.accelerate_keys import REFUSED
from accel_trainer.endings import heard_by_main
from accel_trainer.errors import (
    AccelTrainerError,
    DataError,
    HardwareError,
    Interrupted,
    ProcessLost,
    TrainingFailed,
    UserError,
)
from accel_trainer.run_folder import RunFolder


@pytest.fixture(autouse=True)
def no_launch(tmp_path: Path) -> Iterator[None]:
    with alone_on_the_cpu(tmp_path / "cache"):
        yield


def test_processes_that_ignore_each_other_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # no rendezvous beside it, as PyTorchJob and MPI wrappers may leave it
    # So that nothing tells Accelerate of the CPU.
    monkeypatch.setattr(hardware.torch.accelerator, "is_available", lambda *_, **__: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    with pytest.raises(HardwareError, match=r"the launcher started 2 processes \(WORLD_SIZE\), but Accelerate runs 1"):
        hardware.start_accelerator()


def test_accumulation_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = hardware.start_accelerator()
    assert accelerator.gradient_accumulation_steps == 1
    weight = torch.nn.Parameter(torch.ones(1))
    accelerator.backward((weight * 8).sum())
    assert weight.grad is not None
    assert weight.grad.item() == 8.0


def test_ddp_does_not_broadcast_buffers() -> None:
    accelerator = hardware.start_accelerator()
    assert accelerator.ddp_handler.broadcast_buffers is False
    assert accelerator.step_scheduler_with_optimizer is False


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
    device = torch.device("xla")
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.XLA, num_processes=8, log_with=[], device=device, mixed_precision="no"
    )
    monkeypatch.setattr(hardware, "Accelerator", lambda **_: accelerator)
    assert hardware.start_accelerator() is accelerator


@pytest.mark.parametrize("kind", map(DistributedType, REFUSED))
def test_what_owns_the_step_is_refused(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(num_processes=1, distributed_type=kind, log_with=[], device=torch.device("cpu"))
    monkeypatch.setattr(hardware, "Accelerator", lambda **_: fake)
    with pytest.raises(HardwareError, match=rf"distributed_type {kind.value}: .*use multi_gpu"):
        hardware.start_accelerator()


FSDP = {"VERSION": "2", "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "RESHARD_AFTER_FORWARD": "true"}


def sharding(**more: Any) -> Any:
    """An Accelerator of FSDP, as far as it is looked at."""
    state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=more.pop("backend", DynamoBackend.NO)))
    known = {"num_processes": 1, "distributed_type": DistributedType.FSDP, "log_with": [], "state": state}
    return SimpleNamespace(
        **known, **{"device": torch.device("cuda"), "mixed_precision": "no", "parallelism_config": None, **more}
    )


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({}, ""),
        ({"CPU_RAM_EFFICIENT_LOADING": "false", "STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, ""),
        ({"VERSION": "1"}, "fsdp_version 1: .*; write fsdp_version: 2"),
        ({"VERSION": None}, "fsdp_version 1: "),
        ({"AUTO_WRAP_POLICY": None}, "fsdp_auto_wrap_policy NO_WRAP: .*: TRANSFORMER_BASED_WRAP"),
        ({"TRANSFORMER_CLS_TO_WRAP": "BertLayer"}, "BertLayer: .*; remove fsdp_transformer_layer_cls_to_wrap"),
        ({"CPU_RAM_EFFICIENT_LOADING": "True"}, "fsdp_cpu_ram_efficient_loading True: .*: false"),
        ({"OFFLOAD_PARAMS": "true"}, "fsdp_offload_params true: "),
        ({"ACTIVATION_CHECKPOINTING": "true"}, "--gradient_checkpointing"),
        ({"IGNORED_MODULES": "pooler"}, "remove fsdp_ignored_modules"),
    ],
)
def test_settings_of_fsdp_are_held(said: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**FSDP, **said}.items():
        if value is not None:
            monkeypatch.setenv(f"FSDP_{name}", value)
    monkeypatch.setattr(hardware, "Accelerator", lambda **_: sharding())
    with pytest.raises(HardwareError, match=says) if says else nullcontext():
        hardware.start_accelerator()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"mixed_precision": "bf16"}, ""),
        ({"mixed_precision": "fp16"}, "mixed_precision fp16 .*; use bf16"),
        ({"backend": DynamoBackend.INDUCTOR}, "remove dynamo_config"),
        ({"parallelism_config": object()}, "remove parallelism_config"),
    ],
)
def test_what_was_not_tried_in_shares_is_refused(more: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FSDP.items():
        monkeypatch.setenv(f"FSDP_{name}", value)
    with pytest.raises(HardwareError, match=says) if says else nullcontext():
        hardware.check_fsdp(sharding(**more))


def test_a_config_that_accelerate_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(**_: Any) -> None:
        raise ValueError("fp8 needs a package that is not there")

    monkeypatch.setattr(hardware, "Accelerator", refusing)
    with pytest.raises(HardwareError, match="accelerate config: fp8 needs"):
        hardware.start_accelerator()


@pytest.mark.parametrize("keeps_its_store", [True, False])
def test_processes_of_an_agent_that_keeps_its_store_meet_in_a_room(
    monkeypatch: pytest.MonkeyPatch, keeps_its_store: bool
) -> None:
    store = HashStore()
    monkeypatch.setattr(rendezvous, "_STORES", [])
    monkeypatch.setattr(rendezvous, "rendezvous", lambda _url, **_: iter([(store, 0, 1)]))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(keeps_its_store))
    for _ in range(2):
        assert rendezvous.meeting_place() == "room://"
    found = [next(rendezvous._room_of_this_attempt("room://"))[0] for _ in range(2)]
    for place in found:
        place.set("address", "of this attempt")
    assert store.check(["address"]) is not keeps_its_store
    assert (found[0].num_keys(), found[1] is store) == ((2, False) if keeps_its_store else (1, True))


def test_the_first_word_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_STORES", [])
    rendezvous.leave_word({"reason": "to nobody"})
    assert rendezvous.word_left() == {}
    monkeypatch.setattr(rendezvous, "_STORES", [HashStore()])
    assert rendezvous.word_left() == {}
    rendezvous.leave_word({"reason": "out of memory"})
    rendezvous.leave_word({"reason": "ended by the launcher"})
    assert rendezvous.word_left() == {"reason": "out of memory"}


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


def test_gloo_is_told_the_network_that_leads_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """How it does is shown by two machines; here, where it leaves Gloo alone."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "of the user")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    rendezvous.name_the_network()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "of the user"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    for address in ("127.0.0.1", "::1", "nowhere.invalid"):
        monkeypatch.setenv("MASTER_ADDR", address)
        rendezvous.name_the_network()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # all on this machine
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    rendezvous.name_the_network()
    assert "GLOO_SOCKET_IFNAME" not in os.environ


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (RuntimeError("Gloo connectFullMesh failed with [/pytorch/gloo/pair.cc:152] timed out connecting"), True),
        (torch.distributed.DistNetworkError("The client socket has timed out"), True),
        (RuntimeError("something else"), False),
    ],
)
def test_processes_that_do_not_reach_each_other(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError, named: bool
) -> None:
    def fails(**_: Any) -> None:
        raise error

    monkeypatch.setattr(hardware, "Accelerator", fails)
    expected = "do not reach each other: .*(timed out).*export GLOO_SOCKET_IFNAME=eth0" if named else "something else"
    with pytest.raises(HardwareError if named else RuntimeError, match=expected):
        hardware.start_accelerator()


def rooms(store: Store, world_size: int) -> list[str]:
    """What the processes of an attempt agree on."""
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda rank: rendezvous.agreed_room(store, rank, world_size), reversed(range(world_size))))


def test_every_attempt_has_a_room_of_its_own() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=20))
    store.set("asks 1", "of one that was killed before it was answered")
    found = [rooms(store, size) for size in (2, 3, 1, 2, 3)]
    assert [len(rooms) for rooms in found] == [2, 3, 1, 2, 3]
    assert all(len(set(rooms)) == 1 for rooms in found)
    assert len({rooms[0] for rooms in found}) == 5


def test_a_process_that_never_comes_is_not_waited_for_without_end() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    store.set("asks 2", "of an earlier attempt")
    with pytest.raises(torch.distributed.DistStoreError, match="process 1 of 3 did not come within 0 seconds"):
        rendezvous.agreed_room(store, 0, 3)


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


@pytest.mark.parametrize("seconds", [0, -5])
def test_a_time_out_is_positive(seconds: int) -> None:
    with pytest.raises(UserError, match=rf"--ddp_timeout {seconds}: give seconds, 1 or more"):
        hardware.start_accelerator(timeout=seconds)


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


def test_description_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "HF_TOKEN": "hf_abcdef",
        "WANDB_API_KEY": "k3y",
        "AWS_SECRET_ACCESS_KEY": "s3cret",
        "MASTER_ADDR": "10.1.2.3",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    facts = hardware.describe(hardware.start_accelerator())
    text = json.dumps(facts)
    assert not any(secret in text or name in text for name, secret in secrets.items())
    host = socket.gethostname()
    assert len(host) < 3 or host in platform.platform() or host not in text
    assert facts["accelerate_environment"] == {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "true"}
    assert facts["num_processes"] == 1
    assert facts["device"] == "cpu"
    assert facts["device_memory_bytes"] > 2**28  # of the machine
    assert facts["mixed_precision"] == "no"


def test_precisions_as_people_call_them() -> None:
    assert list(map(hardware.precision_named, ("no", "bf16"))) == ["float32", "bf16"]


def test_versions_are_all_there() -> None:
    found = hardware.versions()
    assert set(found) == {"python", "platform", *hardware.PACKAGES}
    assert found["torch"] == torch.__version__
    assert hardware._installed("no-such-package") is None


def test_budget_is_the_users_or_the_devices() -> None:
    accelerator = hardware.start_accelerator()
    assert device_memory.tokens_per_device(accelerator, (0, 1), 77) == 77
    assert device_memory.tokens_per_device(accelerator, (0, 1), None) == 4096
    assert device_memory.tokens_per_device(accelerator, (0, 1), 1) == 1
    assert device_memory.tokens_per_device(accelerator, (10**15, 1), None) == 512
    for given in (0, -5):
        with pytest.raises(UserError, match=rf"--max_tokens_per_device {given}: give a positive number"):
            device_memory.tokens_per_device(accelerator, (0, 1), given)


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


@pytest.mark.parametrize(("everywhere", "here", "met"), [("1", None, 0), ("2", "2", 0), ("2", "1", 1), ("4", "2", 1)])
@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("lost", [False, True])
def test_a_mistake_before_the_processes_meet_is_told_to_other_machines(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    everywhere: str,
    here: str | None,
    met: int,
    rank: str,
    lost: bool,
) -> None:
    times: list[int] = []
    told: list[Any] = []
    said_before: list[str] = []

    def start(*, timeout: int) -> Any:
        said_before.append(capsys.readouterr().err)  # nobody waits for the others to read it
        times.append(timeout)
        return SimpleNamespace(num_processes=2, process_index=int(rank))

    def gather(own: Any) -> Any:
        told.extend(own)
        if lost:
            raise RuntimeError("[/gloo/pair.cc:1] Connection closed by peer")
        return [*own, None]

    monkeypatch.setenv("WORLD_SIZE", everywhere)
    monkeypatch.setenv("RANK", rank)
    if here is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    monkeypatch.setattr(hardware, "start_accelerator", start)
    monkeypatch.setattr(collectives, "gather_object", gather)
    with pytest.raises(DataError, match="no such file") as caught, hardware.told_to_other_machines(7):
        raise DataError("no such file")
    assert (times, told) == ([7] * met, ["no such file"] * met)
    assert said_before == ["error: no such file\n" if rank == "0" else ""] * met
    assert caught.value.is_told == (met == 1 and rank == "0")
    with hardware.told_to_other_machines(7):
        pass
    assert len(times) == met


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

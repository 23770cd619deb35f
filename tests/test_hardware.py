"""One Accelerator that does what the launcher meant, and a description that tells no secrets."""

from __future__ import annotations

import json
import platform
import socket
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, DynamoBackend
from harness import alone_on_the_cpu

from accel_trainer import collectives, hardware
from accel_trainer.accelerate_keys import REFUSED
from accel_trainer.errors import (
    DataError,
    HardwareError,
    UserError,
)


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


@pytest.mark.parametrize("kind", [*map(DistributedType, REFUSED)])
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


@pytest.mark.parametrize("seconds", [0, -5])
def test_a_time_out_is_positive(seconds: int) -> None:
    with pytest.raises(UserError, match=rf"--ddp_timeout {seconds}: give seconds, 1 or more"):
        hardware.start_accelerator(timeout=seconds)


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

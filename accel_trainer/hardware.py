"""The hardware that a launch put in force: one Accelerator, checked, and described for run.json."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    GradientAccumulationPlugin,
)

from accel_trainer import COLLECTION_THRESHOLD, xla
from accel_trainer.accelerate_keys import FSDP_MUST, FSDP_PRECISIONS, REFUSED, fsdp_remedy
from accel_trainer.collectives import LOST, first_sentence, is_first_process, lost_processes_named, together
from accel_trainer.device_memory import keep_freed_memory, smallest_memory
from accel_trainer.errors import AccelTrainerError, HardwareError, UserError
from accel_trainer.redaction import without_secrets
from accel_trainer.rendezvous import meeting_place, name_the_network
from accel_trainer.terminal import complain

PACKAGES = ("accel_trainer", "torch", "transformers", "accelerate", "datasets", "tokenizers", "evaluate", "numpy")
TIMEOUT = 1800  # seconds, as `TrainingArguments.ddp_timeout`


def start_accelerator(
    report_to: Sequence[str] = (), project_dir: str | Path | None = None, timeout: int = TIMEOUT
) -> Accelerator:
    """The one Accelerator of this process.

    Args:
        report_to: names of trackers.
        project_dir: where trackers write that write files.
        timeout: seconds that processes wait for each other; one of each machine tokenises first, the others wait for it.

    Raises:
        HardwareError: the launch started other processes than the Accelerator knows of, or a plugin that this
            program cannot keep its promise with.
        UserError: a tracker is not installed.
    """
    if timeout < 1:
        raise UserError(f"--ddp_timeout {timeout}: give seconds, 1 or more")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    name_the_network()
    gc.freeze()  # what is imported by now stays for ever
    gc.set_threshold(*COLLECTION_THRESHOLD)
    keep_freed_memory()
    xla.hear_precision()
    try:
        accelerator = Accelerator(
            # Processes started on a machine without an accelerator must be told so, or each believes itself alone.
            cpu=True if world_size > 1 and not torch.accelerator.is_available() else None,
            # Explicit, because ACCELERATE_GRADIENT_ACCUMULATION_STEPS would override a plain argument and every
            # backward pass would be divided by it: accumulation is this program's own arithmetic.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(init_method=meeting_place(), timeout=timedelta(seconds=timeout)),
            ],
            log_with=list(report_to) or None,
            project_dir=project_dir,
        )
    except (ValueError, ImportError) as error:
        raise HardwareError(f"accelerate config: {error}") from error
    except RuntimeError as error:  # DistError, or what Gloo raises
        if not isinstance(error, torch.distributed.DistError) and not any(sign in str(error) for sign in LOST):
            raise
        raise HardwareError(
            f"the processes of the launch do not reach each other: {first_sentence(error)}. If a machine did not end, start all "
            "of them again; else see to it that none keeps another out, and name the network between them on each, as `ip address` "
            "does: export GLOO_SOCKET_IFNAME=eth0 (on GPUs NCCL_SOCKET_IFNAME)"
        ) from error
    xla.keep_float32(accelerator)
    # Accelerate leaves out, without a word, the trackers whose package is not installed.
    missing = sorted(set(report_to) - {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with})
    if missing:
        raise UserError(
            f"tracking.report_to: {', '.join(missing)} is not installed; install it, or take it out of the list"
        )
    # On TPUs torch_xla starts the processes, and WORLD_SIZE is nothing to it.
    if accelerator.num_processes != world_size and accelerator.distributed_type is not DistributedType.XLA:
        raise HardwareError(
            f"the launcher started {world_size} processes (WORLD_SIZE), but Accelerate runs {accelerator.num_processes} "
            f"({accelerator.distributed_type.value}); each would train alone. Launch CPU processes with "
            "accelerate_configs/multi_cpu.yaml, or set ACCELERATE_USE_CPU=true"
        )
    reason = REFUSED.get(accelerator.distributed_type.value)
    if reason is not None:
        raise HardwareError(f"accelerate config: distributed_type {accelerator.distributed_type.value}: {reason}")
    if accelerator.distributed_type is DistributedType.FSDP:
        check_fsdp(accelerator)
    return accelerator


def check_fsdp(accelerator: Accelerator) -> None:
    """See that FSDP is asked for as this program keeps its promise with it.

    Raises:
        HardwareError: it is not.
    """
    for key, must in FSDP_MUST.items():
        said = os.environ.get(must.environment or f"FSDP_{key.upper()}", must.unsaid)
        if said.lower() not in must.values:
            raise HardwareError(f"accelerate config: fsdp_{key} {said or 'left out'}: {must.why}; {fsdp_remedy(key)}")
    if accelerator.mixed_precision not in FSDP_PRECISIONS:
        raise HardwareError(
            f'accelerate config: mixed_precision {accelerator.mixed_precision} has not been tried with FSDP; use bf16 or "no"'
        )
    if accelerator.state.dynamo_plugin.backend is not DynamoBackend.NO:
        raise HardwareError("accelerate config: compiling has not been tried with FSDP; remove dynamo_config")
    if accelerator.parallelism_config is not None:
        raise HardwareError(
            "accelerate config: FSDP in several dimensions has not been tried; remove parallelism_config"
        )


def precision_named(mixed_precision: str) -> str:
    """A precision of Accelerate's as people call it."""
    return "float32" if mixed_precision == "no" else mixed_precision


@contextmanager
def told_to_other_machines(timeout: int) -> Iterator[None]:
    """If a user's mistake shows in the block, before the processes have met, raise it on all machines.

    Each reads files of its own, and those that find no mistake would wait for this one. On one machine all find it.
    The first process says at once what it found: the others may come late, or never.

    Args:
        timeout: seconds that processes wait for each other.

    Raises:
        UserError: the mistake.
    """
    try:
        yield
    except UserError as mistake:
        everywhere, here = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        if int(everywhere) > int(here):
            if is_first_process():
                complain(mistake)
                mistake.is_told = True
            with suppress(AccelTrainerError):
                accelerator = start_accelerator(timeout=timeout)
                with lost_processes_named(accelerator), together(accelerator):
                    raise
        raise


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe(accelerator: Accelerator) -> dict[str, Any]:
    """What was in force, for run.json: no host name, no address, no environment but Accelerate's own settings."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "distributed_type": accelerator.distributed_type.value,
        "num_processes": accelerator.num_processes,
        "device": device.type,
        "device_name": name,
        "device_memory_bytes": smallest_memory(accelerator),
        "mixed_precision": accelerator.mixed_precision,
        "dynamo_backend": os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO"),
        "threads_per_process": torch.get_num_threads(),
        "accelerate_environment": {
            name: without_secrets(value)
            for name, value in sorted(os.environ.items())
            if name.startswith(("ACCELERATE_", "FSDP_"))
        },
    }


def versions() -> dict[str, str | None]:
    """Versions of Python, the platform and the packages that a result may depend on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{p: _installed(p) for p in PACKAGES},
    }

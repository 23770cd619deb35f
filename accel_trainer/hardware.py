"""The hardware that a launch put in force: one Accelerator, checked, and described for run.json."""

from __future__ import annotations

import atexit
import ctypes
import gc
import ipaddress
import json
import os
import platform
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    GradientAccumulationPlugin,
    operations,
)
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from accel_trainer import COLLECTION_THRESHOLD, xla
from accel_trainer.accelerate_keys import FSDP_MUST, FSDP_PRECISIONS, REFUSED, fsdp_remedy
from accel_trainer.batching import token_budget
from accel_trainer.errors import AccelTrainerError, HardwareError, OutOfMemory, ProcessLost, UserError
from accel_trainer.redaction import without_secrets
from accel_trainer.terminal import complain

PACKAGES = ("accel_trainer", "torch", "transformers", "accelerate", "datasets", "tokenizers", "evaluate", "numpy")
# How errors without a type of their own say that the memory is full: CUDA, ROCm and MPS; CPU; cuBLAS and cuDNN; XLA.
OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator: ", "_STATUS_ALLOC_FAILED", "RESOURCE_EXHAUSTED")
# How a collective says that another process did not take part in it: Gloo; NCCL; the store that processes meet at.
LOST = ("/gloo/", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "TCPStore")
TIMEOUT = 1800  # seconds, as `TrainingArguments.ddp_timeout`
SENT_AT_ONCE = 2**26  # bytes
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_GROUPS: list[Any] = []  # see `leave_process_group`
_STORES: list[Store] = []  # that the processes of this attempt met at; none for one alone
_WORD = "last word"
_TURN = threading.Lock()  # of processes that are threads of one, as torch_xla starts them on some machines


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
            f"the processes of the launch do not reach each other: {_first_sentence(error)}. If a machine did not end, start all "
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


def meeting_place() -> str:
    """Where the processes of a launch find each other, as `init_process_group` calls it.

    torchrun keeps its store when it starts processes again (2.13), with the addresses of those that died: the new ones would
    wait for these for ever, or be refused. They get a room of their own. How often a machine was started again is no name for
    it: one that was taken in later counts otherwise, and one that makes room for it does not count at all.
    """
    with suppress(RuntimeError):  # it is known already
        register_rendezvous_handler("room", _room_of_this_attempt)
    return "room://"


def _room_of_this_attempt(_url: str, **arguments: Any) -> Iterator[tuple[Store, int, int]]:
    for store, rank, world_size in rendezvous("env://", **arguments):
        room = store
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # else it is as new as this attempt
            room = PrefixStore(f"room {agreed_room(store, rank, world_size)}", store)
        _STORES.append(room)
        yield room, rank, world_size


def agreed_room(store: Store, rank: int, world_size: int) -> str:
    """A name that the processes of this attempt have in common, and no earlier attempt had. Collective.

    Each asks under its rank with a word of its own, and only the first process of this attempt answers to that word, so that
    what an earlier attempt left in the store misleads nobody.

    Raises:
        DistStoreError: another one does not ask or answer within the store's time-out.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks {rank}", own)
        room = store.get(f"answer {own}").decode()
        store.set(f"in {room} {rank}", "")
        return room
    awaited, answered = set(range(1, world_size)), set()
    patience: float = store.timeout.total_seconds()  # type: ignore[attr-defined]
    end = time.monotonic() + patience
    while awaited:
        for asking in [asking for asking in awaited if store.check([f"asks {asking}"])]:
            word = store.get(f"asks {asking}").decode()
            if word not in answered:  # of an earlier attempt, perhaps: then another follows
                store.set(f"answer {word}", own)
                answered.add(word)
        awaited = {asking for asking in awaited if not store.check([f"in {own} {asking}"])}
        if time.monotonic() > end:
            raise torch.distributed.DistStoreError(
                f"process {min(awaited)} of {world_size} did not come within {patience:.0f} seconds"
            )
        time.sleep(0.01 if awaited else 0)
    return own


def name_the_network() -> None:
    """Have Gloo use the network that leads to the machine where all meet, unless the environment names another.

    By itself it takes the address that the machine's own name resolves to, often one that only this machine reaches.
    """
    everywhere, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    meeting = os.environ.get("MASTER_ADDR")
    if everywhere == here or not meeting or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    with suppress(OSError):  # it cannot be resolved: the meeting tells
        family, kind, protocol, _, address = socket.getaddrinfo(meeting, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as route:
            route.connect(address)  # sends nothing
            own = route.getsockname()[0]
        if ipaddress.ip_address(own.partition("%")[0]).is_loopback:
            return
        for interface, addresses in psutil.net_if_addrs().items():
            if any(found.address.partition("%")[0] == own for found in addresses):
                os.environ["GLOO_SOCKET_IFNAME"] = interface


def leave_word(word: dict[str, Any]) -> None:
    """Leave a word for the main process where all have met, which is still there when this process is not. The first counts."""
    with suppress(RuntimeError):  # that place is gone
        for store in _STORES[-1:]:
            store.compare_set(_WORD, "", json.dumps(word))


def word_left() -> dict[str, Any]:
    """The word that another process left before it ended; empty if none did."""
    with suppress(RuntimeError):
        for store in _STORES[-1:]:
            if store.check([_WORD]):
                found: dict[str, Any] = json.loads(store.get(_WORD))
                return found
    return {}


def is_first_process() -> bool:
    """Whether this process is the one that speaks for all; before there is an Accelerator."""
    return xla.process_index() == 0 if xla.is_spawned() else os.environ.get("RANK", "0") == "0"


def keep_freed_memory() -> None:
    """Let the process keep large blocks of memory that it frees, instead of handing each back to the system.

    Every step would have them paged in again, a tenth of its time on short texts (measured). The GNU C library only.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        for threshold in (2**30, 2**25):  # older versions take no more than the second
            if library.mallopt(M_MMAP_THRESHOLD, threshold):
                break
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def smallest_memory(accelerator: Accelerator) -> int | None:
    """Total memory in bytes of the smallest device of the run, each process's share of it; None where it is not told."""
    device = accelerator.device
    own = -1
    if device.type == "cuda":
        own = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        whole = min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), container_memory())
        own = whole // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    smallest = min(gather_object([own]))
    return None if smallest < 0 else int(smallest)


def container_memory() -> int:
    """Memory in bytes that this process's container may use, by version 2 or 1 of Linux's control groups; else more than any."""
    for place in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such file; "max"
            return int(Path(place).read_text(encoding="ascii"))
    return 2**63


def tokens_per_device(accelerator: Accelerator, needs: tuple[int, int], given: int | None) -> int:
    """Token budget of a micro-batch, the same on every rank: the command line's, or derived from device and model.

    Args:
        accelerator: the run's.
        needs: bytes that stay, and that a token takes: see `memory`.
        given: on the command line, None if it is not.

    Raises:
        UserError: the command line's is not positive.
    """
    if given is not None and given < 1:
        raise UserError(f"--max_tokens_per_device {given}: give a positive number of tokens")
    return given or token_budget(accelerator.device.type, smallest_memory(accelerator), *needs)


@contextmanager
def out_of_memory_named(examples: int = 1, tokens: int = 0) -> Iterator[None]:
    """Give the many errors by which a device says that its memory is full one name.

    Args:
        examples: of the micro-batch that is computed in the block.
        tokens: of all of them, padding included.

    Raises:
        OutOfMemory: it does.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        told = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not told and not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
        reason = str(error).partition("\n")[0].rstrip(".") or "out of memory"
        raise OutOfMemory(reason, examples, tokens) from error


@contextmanager
def lost_processes_named(accelerator: Accelerator) -> Iterator[None]:
    """Give the errors by which a collective says that another process is gone one name.

    Raises:
        ProcessLost: it does.
    """
    try:
        yield
    except RuntimeError as error:
        told = isinstance(error, torch.distributed.DistError) if torch.distributed.is_available() else False
        if accelerator.num_processes == 1 or not (told or any(sign in str(error) for sign in LOST)):
            raise
        reason = _first_sentence(error)
        if "invalid usage" in str(error):
            raise HardwareError(
                f"the processes cannot talk to each other: {reason}; check the accelerate config"
            ) from error
        raise ProcessLost(
            f"process {accelerator.process_index} of {accelerator.num_processes} lost another one, which died or answers no "
            f"more ({reason}). The last checkpoint is kept: run the same line again with --resume"
        ) from error


def _first_sentence(error: RuntimeError) -> str:
    """What a collective says, without the place in the library's source before it, and the advice after it."""
    text = str(error).partition("Last error:")[2] or re.sub(r"^\[[^\]]*\]\s*", "", str(error))
    return text.strip().partition("\n")[0].partition(". ")[0].strip().rstrip(".")


def leave_process_group(accelerator: Accelerator) -> None:
    """Leave the group of processes in order, after the last collective.

    The group's memory stays until the process ends. Freed together with DDP's reducer, while the interpreter is locked, it
    would wait for its own thread, and that one for the interpreter, to free the tensors of the last collective: for ever, in
    one of twenty runs or so (Gloo, torch 2.13).
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _GROUPS.append(torch.distributed.group.WORLD)
    accelerator.end_training()


def precision_named(mixed_precision: str) -> str:
    """A precision of Accelerate's as people call it."""
    return "float32" if mixed_precision == "no" else mixed_precision


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has taken at most: of a card's memory, else of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource  # of Unix alone

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_memory() -> int:
    """Bytes of the machine's memory that this process takes now; at most so far, where the system does not say."""
    with suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory(torch.device("cpu"))


def end_process(code: int) -> NoReturn:
    """End this process with an exit code.

    One that was in a group of processes ends without taking the interpreter apart: that would free the group's memory (see
    `leave_process_group`), and a thread of Gloo's that then asks for the interpreter aborts the process, all work done.
    """
    if not (_GROUPS or (torch.distributed.is_available() and torch.distributed.is_initialized())):
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """If a user's mistake shows on any process inside the block, raise it on all, so that none waits for ever. Collective.

    So it is with a file that cannot be had.

    Raises:
        UserError: this process's own, or else the message of the lowest rank that has one, and its rank.
    """
    mistake = None
    try:
        yield
    except UserError as error:
        mistake = error
    except OSError as error:
        mistake = UserError(f"{error.filename or 'a file'}: {error.strerror or error}")
        mistake.__cause__ = error
    if accelerator.num_processes > 1:
        messages = gather_object([None if mistake is None else str(mistake)])
        others = [f"process {i}: {message}" for i, message in enumerate(messages) if message is not None]
        if mistake is None and others:
            mistake = UserError(others[0])  # whose it is: here the user finds nothing wrong
    if mistake is not None:
        raise mistake


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


@contextmanager
def first_process_first(accelerator: Accelerator) -> Iterator[None]:
    """Let the first process of each machine go through the block before the others, whether it succeeds or not.

    Accelerate's own `local_main_process_first` leaves the others waiting when the first one raises.
    """
    on_xla = accelerator.distributed_type is DistributedType.XLA
    is_first = xla.local_process_index() == 0 if on_xla else accelerator.is_local_main_process
    if not is_first:
        accelerator.wait_for_everyone()
    try:
        with _TURN:  # threads would draw from the same random numbers
            yield
    finally:
        if is_first:
            accelerator.wait_for_everyone()


def gather_object(own: list[Any]) -> list[Any]:
    """What all processes bring, in the order of their ranks: plain values, as JSON knows them. Collective."""
    if PartialState().distributed_type is not DistributedType.XLA:
        return operations.gather_object(own)  # type: ignore[no-any-return]
    # Accelerate's own raises there.
    return [value for text in xla.gather_bytes(json.dumps(own).encode()) for value in json.loads(text)]


def from_main_process(accelerator: Accelerator, value: Any) -> Any:
    """The main process's value on every process, as JSON knows it; what the others bring is left aside. Collective."""
    if accelerator.num_processes == 1:
        return value
    text = json.dumps(value).encode() if accelerator.is_main_process else b""
    size = accelerator.reduce(torch.tensor([len(text)], device=accelerator.device), "sum")
    sent = torch.zeros(int(size), dtype=torch.uint8)
    if accelerator.is_main_process:
        sent = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return json.loads(_bytes_from_main_process(accelerator, sent).numpy().tobytes())


def tensors_from_main_process(
    accelerator: Accelerator,
    tensors: dict[str, Tensor] | None,
    keep: Callable[[str, Tensor], Tensor] = lambda _name, tensor: tensor,
) -> dict[str, Tensor]:
    """The main process's tensors on every process, on the CPU, to the bit. Collective.

    Args:
        accelerator: the run's.
        tensors: on the CPU; None on other processes.
        keep: what a process wants of a tensor, by its name; the rest is let go before the next one is sent.
    """
    if accelerator.num_processes == 1:
        return {name: keep(name, tensor) for name, tensor in (tensors or {}).items()}
    own = tensors if tensors is not None and accelerator.is_main_process else {}
    listed = [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in own.items()]
    found: dict[str, Tensor] = {}
    for name, dtype, shape in from_main_process(accelerator, listed):
        tensor = own[name] if accelerator.is_main_process else torch.zeros(shape, dtype=getattr(torch, dtype))
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, len(flat), SENT_AT_ONCE):  # a large tensor would take a card's memory once more
            part = flat[start : start + SENT_AT_ONCE]
            sent = _bytes_from_main_process(accelerator, part)
            if not accelerator.is_main_process:
                part.copy_(sent)
        found[name] = keep(name, tensor)
    return found


def _bytes_from_main_process(accelerator: Accelerator, sent: Tensor) -> Tensor:
    """The main process's bytes, where those of all others are zeros: a sum, which every kind of device has."""
    size = len(sent)
    if xla.computes_on(accelerator.device):
        sent = xla.filled(sent, size)
    return accelerator.reduce(sent.to(accelerator.device), "sum").cpu()[:size]  # type: ignore[no-any-return]


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

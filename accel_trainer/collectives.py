"""What the processes of a run do together, and how one that is lost is told of."""

from __future__ import annotations

import atexit
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    operations,
)
from torch import Tensor

from accel_trainer import xla
from accel_trainer.errors import HardwareError, ProcessLost, UserError

# How a collective says that another process did not take part in it: Gloo; NCCL; the store that processes meet at.
LOST = ("/gloo/", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "TCPStore")
SENT_AT_ONCE = 2**26  # bytes
_GROUPS: list[Any] = []  # see `leave_process_group`
_TURN = threading.Lock()  # of processes that are threads of one, as torch_xla starts them on some machines


def is_first_process() -> bool:
    """Whether this process is the one that speaks for all; before there is an Accelerator."""
    return xla.process_index() == 0 if xla.is_spawned() else os.environ.get("RANK", "0") == "0"


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
        reason = first_sentence(error)
        if "invalid usage" in str(error):
            raise HardwareError(
                f"the processes cannot talk to each other: {reason}; check the accelerate config"
            ) from error
        raise ProcessLost(
            f"process {accelerator.process_index} of {accelerator.num_processes} lost another one, which died or answers no "
            f"more ({reason}). The last checkpoint is kept: run the same line again with --resume"
        ) from error


def first_sentence(error: RuntimeError) -> str:
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

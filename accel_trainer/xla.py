"""XLA, by which TPUs compute: what is asked of it is collected into a graph, compiled once for each graph, and then done.

Graphs that always look alike are few. So they are cut at the same places, whatever a step consists of: after each
micro-batch, after the update, before what all processes do together. `shapes` keeps those of micro-batches few.
"""

from __future__ import annotations

import os
import sys

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather, is_torch_xla_available
from torch import Tensor, nn

# By either, torch_xla makes all that is on the device bf16; the second is `downcast_bf16` of an accelerate config.
BF16 = ("XLA_USE_BF16", "XLA_DOWNCAST_BF16")


def computes_on(device: torch.device) -> bool:
    """Whether a device is XLA's."""
    return device.type == "xla"


def hear_precision() -> None:
    """Tell the Accelerator, before there is one, that bf16 is wanted: its TPU launcher tells torch_xla alone."""
    if "1" in map(os.environ.get, BF16):
        os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "bf16")


def keep_float32(accelerator: Accelerator) -> None:
    """Let bf16 be autocast, as on other devices: on TPUs Accelerate has torch_xla make weights and optimizer bf16 too.

    To be called before anything is put on the device.
    """
    if computes_on(accelerator.device):
        os.environ.update(dict.fromkeys(BF16, "0"))
        accelerator.native_amp |= accelerator.mixed_precision == "bf16"


def end_graph(device: torch.device) -> None:
    """Let XLA begin with what was asked of it so far. Nobody waits for it; on other devices, nothing."""
    if computes_on(device):
        import torch_xla

        torch_xla.sync()


def renew_gradients(model: nn.Module) -> None:
    """Let each gradient be a new tensor, on XLA: what was added to in place is not changed when Accelerate reduces it.

    So it is with torch_xla 2.9 and Accelerate 1.15: after two micro-batches, each process would go its own way. For the
    moment, every gradient is there twice.
    """
    for parameter in model.parameters():
        if parameter.grad is not None and computes_on(parameter.device):
            parameter.grad = parameter.grad.clone()


def process_index() -> int:
    """Number of this process, or thread, among those that torch_xla started; before there is an Accelerator."""
    import torch_xla.runtime

    return int(torch_xla.runtime.global_ordinal())


def local_process_index() -> int:
    """Its number on this machine, which Accelerate knows on TPUs alone."""
    import torch_xla.runtime

    return int(torch_xla.runtime.local_ordinal())


def compilations() -> int:
    """Graphs that this process has compiled so far."""
    from torch_xla.debug import metrics

    return int(metrics.counter_value("UncachedCompile") or 0)


def is_spawned() -> bool:
    """Whether torch_xla's launcher called this program as a function, in a process of its own."""
    return "FORK_LAUNCHED" in os.environ and is_torch_xla_available()


def end_function(code: int) -> int:
    """The exit code, for a launcher of programs; one of functions, which takes no result, is told by what is raised.

    Raises:
        SystemExit: torch_xla's launcher called, and something went wrong.
    """
    if code and is_spawned():
        sys.exit(code)
    return code


def gather_bytes(own: bytes) -> list[bytes]:
    """What all processes bring, in the order of their ranks. Collective."""
    device = PartialState().device
    sizes = gather(torch.tensor([len(own)]).to(device)).tolist()
    text = filled(torch.tensor(list(own), dtype=torch.uint8), max(sizes))
    texts = gather(text.to(device)).cpu().reshape(len(sizes), -1)
    return [bytes(text[:size].tolist()) for text, size in zip(texts, sizes, strict=True)]


def filled(sent: Tensor, size: int) -> Tensor:
    """Bytes (n,) with zeros after them up to a power of two that is `size` at least, so that few lengths are compiled."""
    return torch.nn.functional.pad(sent, (0, max(1024, 1 << (size - 1).bit_length()) - len(sent)))

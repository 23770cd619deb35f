"""The memory that there is, and how a device says that it is full."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import Accelerator

from accel_trainer.batching import token_budget
from accel_trainer.collectives import gather_object
from accel_trainer.errors import OutOfMemory, UserError

# How errors without a type of their own say that the memory is full: CUDA, ROCm and MPS; CPU; cuBLAS and cuDNN; XLA.
OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator: ", "_STATUS_ALLOC_FAILED", "RESOURCE_EXHAUSTED")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


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

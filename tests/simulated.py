"""Several processes in one: a thread for each rank, with a model of its own and the collectives of a process group.

Everything above the Accelerator is the program's own code: `prepare`, `fit`, `save`, `continue_run`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType

from accel_trainer.errors import Interrupted
from accel_trainer.inputs import Inputs
from accel_trainer.resuming import continue_run
from accel_trainer.run import prepare
from accel_trainer.run_folder import RunFolder
from accel_trainer.signals import StopRequest
from accel_trainer.train import fit


class Group:
    """The meeting point of `count` ranks."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.barrier = threading.Barrier(count, timeout=60)
        self.slots: list[Any] = [None] * count

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """What every rank brought, in the order of ranks."""
        self.slots[rank] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found


class Rank:
    """What the program uses of an Accelerator, for one rank of a group; gradients are averaged as DDP does."""

    device = torch.device("cpu")
    scaler = None
    mixed_precision = "no"
    distributed_type = DistributedType.MULTI_CPU
    trackers: list[Any] = []  # noqa: RUF012

    def __init__(self, group: Group, index: int) -> None:
        self.group, self.process_index, self.num_processes = group, index, group.count
        self.is_main_process = index == 0
        self._synchronises = True
        self._model: Any = None

    def prepare(self, model: Any, optimizer: Any) -> tuple[Any, Any]:
        self._model = model
        return model, optimizer

    @contextlib.contextmanager
    def no_sync(self, model: Any) -> Iterator[None]:
        self._synchronises = False
        yield
        self._synchronises = True

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        if not self._synchronises:
            return
        mine = [p.grad for p in self._model.parameters() if p.requires_grad]
        everyone = self.group.exchange(self.process_index, mine)
        averages = [sum(shares[1:], shares[0]) / self.num_processes for shares in zip(*everyone, strict=True)]
        self.group.exchange(self.process_index, None)  # nobody writes before all have read
        for gradient, average in zip(mine, averages, strict=True):
            gradient.copy_(average)

    def clip_grad_norm_(self, parameters: Any, bound: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, bound)

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return torch.stack(self.group.exchange(self.process_index, tensor.clone())).sum(0, dtype=tensor.dtype)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.group.exchange(self.process_index, tensor.clone()))

    def get_state_dict(self, model: Any) -> dict[str, torch.Tensor]:
        return model.state_dict()

    def wait_for_everyone(self) -> None:
        self.group.exchange(self.process_index, None)


def run_ranks(count: int, work: Callable[[Rank], None]) -> None:
    """`work` once per rank, at the same time; the first error of any is raised."""
    group = Group(count)
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(Rank(group, index))
        except BaseException as error:
            errors.insert(0 if not isinstance(error, threading.BrokenBarrierError) else len(errors), error)
            group.barrier.abort()

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def train_as(
    inputs: Inputs,
    folder: Path,
    count: int,
    max_tokens: int,
    *,
    layout: str = "packed",
    stop_after: int | None = None,
) -> None:
    """Train as `count` processes, from the newest checkpoint in `folder` if there is one, to the end or to a step."""

    def work(rank: Rank) -> None:
        own = dataclasses.replace(inputs, model=copy.deepcopy(inputs.model))
        run = prepare(rank, own, RunFolder(folder), layout=layout, max_tokens_per_device=max_tokens)  # type: ignore[arg-type]
        assert run.packed is (layout == "packed")
        continue_run(run, None, (), keep_token_budget=False)
        with contextlib.suppress(Interrupted):
            fit(run, StopRequest(), stop_after)

    folder.mkdir(parents=True, exist_ok=True)
    run_ranks(count, work)

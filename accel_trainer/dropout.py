"""Dropout that belongs to the example: its masks are the same on whatever machine, and beside whatever else, it is computed.

Whether one number is dropped is a function of (seed, step, example, site, its place within the example). A *site* is a
call: the module's name, and which of its calls in this forward pass it is, since ALBERT runs one layer several times. No
random stream is drawn from, so that processes, micro-batches, resuming and gradient checkpointing, which computes layers
twice, cannot change a mask.

The hash is 32 bits wide and made of plain tensor operations, because those run on every device and are faster on a CPU
than torch's own dropout (`benchmarks/dropout.py`). Each 32-bit word decides two neighbouring features by 16 bits each.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from accel_trainer.errors import UserError
from accel_trainer.hashing import Purpose, keyed
from accel_trainer.order import Rows
from accel_trainer.packing import Packing

LEVELS = 2**16  # of a drop probability


def example_keys(rows: Rows, *, seed: int, step: int) -> Tensor:
    """Keys of examples in one optimizer step, as a tensor, so that no compiler makes a constant of seed or step.

    Args:
        rows: row numbers in the training split, shape (b,).
        seed: `training.seed`.
        step: optimizer steps taken before this one.

    Returns:
        shape (b, 4), int32: two words of the example, because 2³² keys are few enough to meet by chance within a run, and
        two of the step, the same for all, for dropout of what belongs to no example.
    """
    words = np.empty((len(rows), 2), dtype=np.uint64)
    words[:, 0] = keyed(rows, Purpose.DROPOUT, seed, step)
    words[:, 1] = keyed(0, Purpose.SHARED_DROPOUT, seed, step)
    return torch.from_numpy(words.view(np.int32))


def _signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits."""
    word %= 2**32
    return word - 2**32 if word >= 2**31 else word


# Multipliers and shifts of `lowbias32` (Wellons, hash-prospector), chosen by search for their small bias.
M1, M2 = _signed(0x7FEB352D), _signed(0x846CA68B)
# Odd numbers that spread coordinates over all 32 bits before they meet a key: 2³² ÷ the golden ratio; one of Murmur3's.
SPREAD_A, SPREAD_B = _signed(0x9E3779B1), _signed(0x85EBCA6B)


def _scramble(word: Tensor, other: Tensor) -> Tensor:
    """Hash `word` (int32, overwritten) by `lowbias32`, with a second word added half way: bijective in each of them.

    Adding it at the end, or before, would make masks under two keys shifted copies of each other.
    """
    word.bitwise_xor_(_shifted(word, 16)).mul_(M1).add_(other)
    word.bitwise_xor_(_shifted(word, 15)).mul_(M2)
    return word.bitwise_xor_(_shifted(word, 16))


def _shifted(word: Tensor, by: int) -> Tensor:
    """The bits of int32 words moved down, zeros above them."""
    if word.device.type == "xla":  # whose shift is a division that rounds to zero (torch_xla 2.9)
        word = word & -(2**by)
    # int32 shifts copy the sign, so that the copies are masked away.
    return (word >> by).bitwise_and_(2 ** (32 - by) - 1)


def _absorb(a: Tensor, b: Tensor, coordinate: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of words (a, b) after one more coordinate, all int32 that broadcast. Bijective for each coordinate."""
    a = _scramble(a ^ coordinate * SPREAD_A, b)
    return a, _scramble(b ^ coordinate * SPREAD_B, a)


def drop(x: Tensor, p: float, keys: tuple[Tensor, Tensor], packing: Packing | None = None) -> Tensor:
    """Dropout of `x` with masks from the keys of its examples.

    The probability is rounded to a 65536th, and what is kept is scaled by that rounded rate, so that the expectation is
    exactly `x`.

    Args:
        x: (b, …, features), any floating type. Examples may be folded with a second axis, as in DeBERTa's attention
            (b·heads, queries, keys). The mask at an index does not depend on how far any axis extends, so that padding
            changes nothing. Packed, (1, t, …, features): the masks are those of the same examples padded.
        p: probability of dropping.
        keys: two words of each example at this site, each (b,) int32.
        packing: of the micro-batch, None if it is padded.

    Returns:
        shape and type of `x`.

    Raises:
        UserError: the first axis is not that of the examples.
    """
    a, b = keys
    threshold = round(p * LEVELS)
    if threshold in (0, LEVELS):
        return x if threshold == 0 else x * 0.0
    if packing is not None and packing.is_row(x):  # as if the places in an example were the next axis
        a, b = _absorb(a[packing.examples], b[packing.examples], packing.positions)
        unfolded = x[0]
    elif len(x) % len(a):
        raise UserError(f"model: dropout of {tuple(x.shape)} values for {len(a)} examples; use another encoder")
    else:
        unfolded = x if len(x) == len(a) else x.reshape(len(a), -1, *x.shape[1:])
    for size in unfolded.shape[1:-1]:
        a, b = _absorb(a.unsqueeze(-1), b.unsqueeze(-1), torch.arange(size, dtype=torch.int32, device=x.device))
    features = unfolded.shape[-1]
    pairs = torch.arange((features + 1) // 2, dtype=torch.int32, device=x.device)
    words = _scramble(a.unsqueeze(-1) ^ pairs * SPREAD_A, b.unsqueeze(-1))
    kept = words.view(torch.int16)[..., :features] >= threshold - LEVELS // 2
    # Truth values keep one byte a number for the backward pass, but a CPU multiplies numbers of one type twice as fast.
    kept = kept.reshape(x.shape).to(x.dtype if x.device.type == "cpu" else torch.bool)
    return x * kept * (LEVELS / (LEVELS - threshold))


@dataclass
class ForwardPass:
    """What is being computed, for the modules of a model to know: set anew for every forward pass."""

    words: Tensor | None = None  # (b, 4) int32, keys of the examples of the micro-batch
    packing: Packing | None = None  # how they stand in one row; None: padded, each in a row of its own
    shared: frozenset[str] = frozenset()  # modules that drop from what belongs to no example, as DeBERTa's positions
    calls: Counter[str] = field(default_factory=Counter)  # by module, in this forward pass
    # The forward pass is over: what computes now is gradient checkpointing, in the backward pass.
    replaying: bool = False

    def begin(self, words: Tensor | None, packing: Packing | None = None) -> None:
        """Start a forward pass."""
        self.words, self.packing, self.replaying = words, packing, False
        self.calls.clear()

    def end(self, *, backward_follows: bool = True) -> None:
        """End it; keys and packing stay in force for the backward pass, if there is one."""
        self.replaying = True
        self.packing = self.packing if backward_follows else None

    def call(self, module: str) -> int:
        """How many calls of a module this pass has seen before this one.

        Raises:
            UserError: a module that is used several times is computed again, and nobody can tell which time is meant.
        """
        if self.replaying:
            if self.calls[module] != 1:
                raise UserError(
                    f"model: {module} is used {self.calls[module]} times in a forward pass, so that it cannot be computed again; "
                    "train it without gradient (or activation) checkpointing"
                )
            return 0
        self.calls[module] += 1
        return self.calls[module] - 1

    def at(self, site: Site) -> tuple[Tensor, Tensor]:
        """Keys of the examples at this call of a site, each (b,); at a shared site the step's, each (1,).

        Raises:
            UserError: as `call`.
        """
        assert self.words is not None, "a forward pass in training needs the keys of its examples"
        call = self.call(site.module)
        words = self.words[:1, 2:] if site.module in self.shared else self.words[:, :2]
        a, b = words.unbind(-1)
        for coordinate in (site.word, call):
            a, b = _absorb(a, b, a.new_full((), coordinate))  # filled on the device: a copy would wait for it
        return a, b


@dataclass(frozen=True)
class Site:
    """Where dropout may happen: a module's name, and the forward pass of its model."""

    forward_pass: ForwardPass
    module: str
    word: int = field(init=False)  # hash of the name

    def __post_init__(self) -> None:
        digest = hashlib.sha256(self.module.encode()).digest()
        object.__setattr__(self, "word", _signed(int.from_bytes(digest[:4], "little")))

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Dropout of `x` (b, …, features) at this site's next call."""
        return drop(x, p, self.forward_pass.at(self), self.forward_pass.packing)


class KeyedDropout(nn.Dropout):
    """`nn.Dropout` at a site."""

    def __init__(self, p: float, site: Site) -> None:
        super().__init__(p)
        self.site = site

    def forward(self, input: Tensor) -> Tensor:
        """`input` (b, …, features) with dropout in training, and as it is otherwise."""
        return self.site.drop(input, self.p) if self.training and self.p > 0 else input


def install(model: PreTrainedModel, forward_pass: ForwardPass) -> None:
    """Give every dropout of a model a site, and every other module one for its attention. Nothing of it is saved."""
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if type(module) in (nn.Dropout, KeyedDropout):
            replaced[module] = KeyedDropout(module.p, Site(forward_pass, name))
        else:
            module.dropout_site = Site(forward_pass, name)  # any of them may compute attention
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                setattr(parent, name, replaced[child])

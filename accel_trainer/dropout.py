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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from accel_trainer.errors import UserError
from accel_trainer.hashing import Purpose, keyed
from accel_trainer.order import Rows

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
    # int32 shifts copy the sign, so that the copies are masked away.
    word.bitwise_xor_((word >> 16).bitwise_and_(0xFFFF)).mul_(M1).add_(other)
    word.bitwise_xor_((word >> 15).bitwise_and_(0x1FFFF)).mul_(M2)
    return word.bitwise_xor_((word >> 16).bitwise_and_(0xFFFF))


def _absorb(a: Tensor, b: Tensor, coordinate: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of words (a, b) after one more coordinate, all int32 that broadcast. Bijective for each coordinate."""
    a = _scramble(a ^ coordinate * SPREAD_A, b)
    return a, _scramble(b ^ coordinate * SPREAD_B, a)


def drop(x: Tensor, p: float, keys: tuple[Tensor, Tensor]) -> Tensor:
    """Dropout of `x` with masks from the keys of its examples.

    The probability is rounded to a 65536th, and what is kept is scaled by that rounded rate, so that the expectation is
    exactly `x`.

    Args:
        x: (b, …, features), any floating type. Examples may be folded with a second axis, as in DeBERTa's attention
            (b·heads, queries, keys). The mask at an index does not depend on how far any axis extends, so that padding
            changes nothing.
        p: probability of dropping.
        keys: two words of each example at this site, each (b,) int32.

    Returns:
        shape and type of `x`.

    Raises:
        UserError: the first axis is not that of the examples.
    """
    a, b = keys
    threshold = round(p * LEVELS)
    if threshold in (0, LEVELS):
        return x if threshold == 0 else x * 0.0
    if len(x) % len(a):
        raise UserError(f"model: dropout of {tuple(x.shape)} values for {len(a)} examples; use another encoder")
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
class DropoutKeys:
    """Whose dropout is computed: common to all sites of a model, set anew for every forward pass."""

    words: Tensor | None = None  # (b, 4) int32, of the examples of the micro-batch
    shared: frozenset[str] = frozenset()  # modules that drop from what belongs to no example, as DeBERTa's positions
    calls: Counter[str] = field(default_factory=Counter)  # by module, in this forward pass
    # The forward pass is over: what computes now is gradient checkpointing, in the backward pass.
    replaying: bool = False

    def begin(self, words: Tensor | None) -> None:
        """Start a forward pass."""
        self.words, self.replaying = words, False
        self.calls.clear()

    def end(self) -> None:
        """End it; the keys stay in force for the backward pass."""
        self.replaying = True

    def at(self, site: Site) -> tuple[Tensor, Tensor]:
        """Keys of the examples at this call of a site, each (b,); at a shared site the step's, each (1,).

        Raises:
            UserError: a layer that is used several times is computed again, and nobody can tell which time is meant.
        """
        assert self.words is not None, "a forward pass in training needs the keys of its examples"
        if self.replaying:
            if self.calls[site.module] != 1:
                raise UserError(
                    f"model: {site.module} is used {self.calls[site.module]} times in a forward pass, so that its dropout cannot be "
                    "replayed; train it without gradient (or activation) checkpointing"
                )
            call = 0
        else:
            call = self.calls[site.module]
            self.calls[site.module] += 1
        words = self.words[:1, 2:] if site.module in self.shared else self.words[:, :2]
        a, b = words.unbind(-1)
        for coordinate in (site.word, call):
            a, b = _absorb(a, b, a.new_full((), coordinate))  # filled on the device: a copy would wait for it
        return a, b


@dataclass(frozen=True)
class Site:
    """Where dropout may happen: a module's name and the keys of its model."""

    keys: DropoutKeys
    module: str
    word: int = field(init=False)  # hash of the name

    def __post_init__(self) -> None:
        digest = hashlib.sha256(self.module.encode()).digest()
        object.__setattr__(self, "word", _signed(int.from_bytes(digest[:4], "little")))

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Dropout of `x` (b, …, features) at this site's next call."""
        return drop(x, p, self.keys.at(self))


class KeyedDropout(nn.Dropout):
    """`nn.Dropout` at a site."""

    def __init__(self, p: float, site: Site) -> None:
        super().__init__(p)
        self.site = site

    def forward(self, input: Tensor) -> Tensor:
        """`input` (b, …, features) with dropout in training, and as it is otherwise."""
        return self.site.drop(input, self.p) if self.training and self.p > 0 else input


ATTENTION = "accel_trainer"  # the name that transformers knows the function below by


def keyed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: fused without dropout, on an explicit path with it.

    Legend: b examples, h heads, q queries, k keys, d features of a head.

    Args:
        module: the attention module that calls, made known to its `Site` by `install`.
        query: (b, h, q, d).
        key: (b, h, k, d).
        value: (b, h, k, d).
        attention_mask: (b, 1, q, k) or broadcastable, True where a query may look, or a number added to its score; None
            if it may look everywhere.
        dropout: probability of dropping an attention weight.
        scaling: factor of the scores, d^-½ by default.
        kwargs: what else the model hands on.

    Returns:
        (b, q, h, d), and None in the place of the weights.
    """
    if not module.training or dropout == 0:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=scaling, **kwargs)
    if kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        raise UserError("model.attention_dropout: this encoder bends its attention scores; set the key to 0.0")
    is_causal = kwargs.get("is_causal")
    if attention_mask is None and (getattr(module, "is_causal", False) if is_causal is None else is_causal):
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    groups = getattr(module, "num_key_value_groups", 1)  # queries that share a key, as in EuroBERT
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query * (query.shape[-1] ** -0.5 if scaling is None else scaling) @ key.transpose(-1, -2)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:  # finite, because a padded query may have no key to look at
            hidden = torch.finfo(scores.dtype).min / 2  # leaves room for the score in float16
            attention_mask = torch.zeros_like(attention_mask, dtype=scores.dtype).masked_fill(~attention_mask, hidden)
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    site: Site = module.dropout_site  # type: ignore[assignment]
    return (site.drop(weights, dropout) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, keyed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # without it the function would get no mask and attend to padding


def install(model: PreTrainedModel) -> DropoutKeys:
    """Give every dropout of a model a site, attention's too. Nothing of it is saved with the model.

    Attention that is not torch's fused one by default is left alone: it may do more than the function above knows of.

    Returns:
        the keys that all its sites read.
    """
    keys = DropoutKeys()
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if type(module) in (nn.Dropout, KeyedDropout):
            replaced[module] = KeyedDropout(module.p, Site(keys, name))
        else:
            module.dropout_site = Site(keys, name)  # any of them may compute attention
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                setattr(parent, name, replaced[child])
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)
    return keys

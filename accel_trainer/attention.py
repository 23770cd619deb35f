"""Attention inside each example: fused where nothing is dropped, on an explicit path with keyed dropout where it is.

Legend: b examples, t tokens of all of them, h heads, q queries, k keys, d features of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from accel_trainer.dropout import Site, drop
from accel_trainer.errors import UserError
from accel_trainer.packing import Packing

ATTENTION = "accel_trainer"  # the name that transformers knows `attend` by


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the attention module that calls, made known to its `Site` by `dropout.install`.
        query: padded (b, h, q, d), packed (1, h, t, d). The last layer may ask for each example's first token only,
            (b, h, 1, d) in both.
        key: padded (b, h, k, d), packed (1, h, t, d).
        value: as `key`.
        attention_mask: (b, 1, q, k) or broadcastable, True where a query may look, or a number added to its score; None
            if it may look everywhere, or packed.
        dropout: probability of dropping an attention weight.
        scaling: factor of the scores, d^-½ by default.
        kwargs: what else the model hands on, such as `sliding_window`.

    Returns:
        (b, q, h, d), packed (1, t, h, d); and None in the place of the weights.

    Raises:
        UserError: the model wants more of attention than is known here.
    """
    site: Site = module.dropout_site  # type: ignore[assignment]
    packing, p = site.forward_pass.packing, dropout if module.training else 0.0
    if packing is None and p == 0:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=scaling, **kwargs)
    if kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        raise UserError("model.attention_dropout: this encoder bends its attention scores; set the key to 0.0")
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if packing is None and attention_mask is None and is_causal:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if (groups := getattr(module, "num_key_value_groups", 1)) > 1:  # queries that share a key, as in EuroBERT
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys = site.forward_pass.at(site) if p else None
    if packing is None:
        assert keys is not None
        return explicit(query, key, value, attention_mask, p, keys, scaling).transpose(1, 2).contiguous(), None
    if is_causal:
        raise UserError("model: a decoder's attention cannot be packed")
    return packed_attention(query, key, value, packing, kwargs.get("sliding_window"), p, keys, scaling), None


def explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    p: float,
    keys: tuple[Tensor, Tensor],
    scaling: float,
) -> Tensor:
    """Attention with keyed dropout of its weights, (b, h, q, d); `mask` as in `attend`, `keys` as in `dropout.drop`."""
    scores = query * scaling @ key.transpose(-1, -2)
    if mask is not None:
        if mask.dtype == torch.bool:  # finite, because a padded query may have no key to look at
            hidden = torch.finfo(scores.dtype).min / 2  # leaves room for the score in float16
            mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, hidden)
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return drop(weights, p, keys) @ value


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    window: int | None,
    p: float,
    keys: tuple[Tensor, Tensor] | None,
    scaling: float,
) -> Tensor:
    """Attention inside each packed example; shapes as in `attend`.

    Args:
        query: of all tokens, or of each example's first.
        key: of all tokens.
        value: of all tokens.
        packing: which tokens belong together.
        window: a token looks at others less than so many places away; None: at its whole example.
        p: probability of dropping an attention weight.
        keys: of the examples, where p is not 0.
        scaling: factor of the scores.
    """
    if keys is not None:

        def dropping(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, examples: slice) -> Tensor:
            return explicit(q, k, v, mask, p, (keys[0][examples], keys[1][examples]), scaling)

        return _padded(query, key, value, packing, packing.groups, window, dropping)
    if query.device.type == "cpu":
        return _in_short_calls(query, key, value, packing, window, scaling)
    # What the kernels take: half precision, and heads of such widths.
    fits = query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    # The kernels count a window from the last key, so that it would not lie around a query that is an example's first.
    has_window_elsewhere = window is not None and _first_only(query, packing)
    if fits and not has_window_elsewhere and (varlen := _varlen_kernel(query.device)) is not None:
        return varlen(query, key, value, packing, window, scaling)

    def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, _: slice) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)

    # All together in one call, unless that would be mostly padding.
    is_sparse = len(packing.lengths) * packing.max_seqlen > 2 * len(packing.examples)
    return _padded(query, key, value, packing, packing.groups if is_sparse else [packing], window, fused)


def _first_only(query: Tensor, packing: Packing) -> bool:
    return query.shape[2] == 1 and len(query) == len(packing.lengths)


def _in_short_calls(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, window: int | None, scaling: float
) -> Tensor:
    """One fused call for each long example, or for some short ones behind a mask: what a CPU does fastest."""
    first_only = _first_only(query, packing)
    sizes = packing.short_tokens
    queries = query.transpose(0, 2).split(packing.short, 2) if first_only else query.split(sizes, 2)
    masks = packing.masks(window, first_only=first_only, dtype=query.dtype)
    found = [
        scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        for q, k, v, mask in zip(queries, key.split(sizes, 2), value.split(sizes, 2), masks, strict=True)
    ]
    row = torch.cat(found, 2).transpose(1, 2)  # (1, queries, h, d)
    return row.transpose(0, 1) if first_only else row


def _padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    groups: list[Packing],
    window: int | None,
    compute: Callable[[Tensor, Tensor, Tensor, Tensor | None, slice], Tensor],
) -> Tensor:
    """`compute` on groups of examples, padded within each group: only attention, which is little of a model, is padded.

    Besides queries, keys, values and mask it is told which examples they are of.
    """
    first_only = _first_only(query, packing)
    sizes = [len(group.examples) for group in groups]
    rows = [part.transpose(1, 2).split(sizes, 1) for part in (key, value)]
    queries = query.split([len(group.lengths) for group in groups]) if first_only else query.split(sizes, 2)
    found, start = [], 0
    for group, q, k, v in zip(groups, queries, *rows, strict=True):
        examples = slice(start, start := start + len(group.lengths))
        padded = q if first_only else group.pad(q.transpose(1, 2)).transpose(1, 2)
        mask = None if min(group.lengths) == group.max_seqlen else group.mask[:, None, None]
        if window is not None and group.max_seqlen > window:
            places = torch.arange(group.max_seqlen, device=q.device)
            near = (places[: padded.shape[2], None] - places).abs() < window
            mask = near if mask is None else near & mask
        parts = (padded, group.pad(k).transpose(1, 2), group.pad(v).transpose(1, 2))
        out = compute(*parts, mask, examples).transpose(1, 2)
        found.append(out if first_only else group.unpad(out))
    return torch.cat(found, 0 if first_only else 1)


@lru_cache
def _varlen_kernel(
    device: torch.device,
) -> Callable[[Tensor, Tensor, Tensor, Packing, int | None, float], Tensor] | None:
    """A kernel for examples of different lengths in one row, where this machine has one: torch's, or FlashAttention's."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    kernel: Callable[..., Tensor]
    try:
        from torch.nn.attention.varlen import varlen_attn

        if "window_size" not in signature(varlen_attn).parameters:  # torch 2.10
            raise ImportError

        def kernel(q: Tensor, k: Tensor, v: Tensor, *bounds: Any, window: tuple[int, int], scaling: float) -> Tensor:
            return varlen_attn(q, k, v, *bounds, scale=scaling, window_size=window)  # type: ignore[return-value]

    except ImportError:
        if find_spec("flash_attn") is None:
            return None
        from flash_attn import flash_attn_varlen_func

        def kernel(q: Tensor, k: Tensor, v: Tensor, *bounds: Any, window: tuple[int, int], scaling: float) -> Tensor:
            return flash_attn_varlen_func(q, k, v, *bounds, softmax_scale=scaling, window_size=window)  # type: ignore[no-any-return]

    def attend_in_row(
        query: Tensor, key: Tensor, value: Tensor, packing: Packing, window: int | None, scaling: float
    ) -> Tensor:
        first_only = _first_only(query, packing)
        k, v = key[0].transpose(0, 1), value[0].transpose(0, 1)  # (t, h, d)
        sides = (-1, -1) if window is None else (window - 1, window - 1)
        if first_only:
            ones = torch.arange(len(packing.lengths) + 1, dtype=torch.int32, device=device)
            bounds = (ones, packing.cu_seqlens, 1, packing.max_seqlen)
            return kernel(query[:, :, 0], k, v, *bounds, window=sides, scaling=scaling).unsqueeze(1)
        bounds = (packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen)
        return kernel(query[0].transpose(0, 1), k, v, *bounds, window=sides, scaling=scaling).unsqueeze(0)

    return attend_in_row


def padding_mask(**named: Any) -> Tensor | None:
    """The mask that transformers makes for `attend`: none if there is no padding mask, which is so when packed.

    Looking whether anything is padded would wait for a GPU.
    """
    padding: Tensor | None = named["attention_mask"]
    if padding is None:
        return None
    skips = named.get("allow_is_bidirectional_skip", False) and padding.device.type == "cpu"
    mask: Tensor | None = sdpa_mask(**{**named, "allow_is_bidirectional_skip": skips})
    return mask


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, padding_mask)  # without it there would be no mask, and padding attended to


def install(model: PreTrainedModel) -> bool:
    """Let a model attend by `attend`; whether it does.

    One whose attention is not torch's fused one by default is left alone: it may do more than is known here.
    """
    if model.config._attn_implementation in ("sdpa", ATTENTION):
        model.set_attn_implementation(ATTENTION)
    return bool(model.config._attn_implementation == ATTENTION)

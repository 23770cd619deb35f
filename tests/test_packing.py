"""Examples in one row keep their places, see nobody else's tokens, and drop what they drop when they are padded."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from accel_trainer import attention
from accel_trainer.attention import explicit, packed_attention
from accel_trainer.dropout import ForwardPass, Site, drop, example_keys
from accel_trainer.errors import UserError
from accel_trainer.packing import SHORT, Packing

AROUND_SHORT = [1, 31, 32, 33, 48, 62, 63, 64, 65, 66, 100, 130]
few = st.lists(st.integers(1, 12), min_size=1, max_size=8)
any_lengths = few | st.lists(st.integers(1, 12) | st.sampled_from(AROUND_SHORT), min_size=1, max_size=8)
windows = st.none() | st.integers(1, 9) | st.sampled_from([31, 32, 33, 64, 65, 200])


def pieces(row: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """What belongs to each example, (its tokens, …), of a row (1, t, …)."""
    return list(row[0].split(list(lengths)))


# ------------------------------------------------------------------------------------------------------------------------
# Where the examples stand.


@given(any_lengths)
def test_every_token_knows_its_example_and_its_place(lengths: list[int]) -> None:
    packing = Packing.of(np.asarray(lengths))
    tokens = [(i, place) for i, n in enumerate(lengths) for place in range(n)]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert packing.lengths == tuple(lengths)
    assert all(type(length) is int for length in packing.lengths)
    assert packing.examples.tolist() == [i for i, _ in tokens]
    assert packing.positions.tolist() == [place for _, place in tokens]
    assert packing.cu_seqlens.tolist() == starts
    assert packing.starts.tolist() == starts[:-1]
    assert packing.max_seqlen == max(lengths)
    types = [packing.examples.dtype, packing.positions.dtype, packing.cu_seqlens.dtype, packing.starts.dtype]
    assert types == [torch.int64, torch.int32, torch.int32, torch.int64]  # kernels and hashes want 32 bits
    assert packing.mask.dtype == torch.bool
    assert packing.mask.tolist() == [[place < n for place in range(max(lengths))] for n in lengths]


@given(any_lengths, st.lists(st.integers(1, 3), max_size=2))
def test_padding_and_taking_it_away_again(lengths: list[int], rest: list[int]) -> None:
    packing, (b, t) = Packing.of(lengths), (len(lengths), max(lengths))
    row = torch.rand(1, sum(lengths), *rest) + 1  # nowhere zero
    padded = packing.pad(row)
    assert padded.shape == (b, t, *rest)
    for i, piece in enumerate(pieces(row, lengths)):
        assert torch.equal(padded[i, : lengths[i]], piece)
        assert not padded[i, lengths[i] :].any()
    assert torch.equal(packing.unpad(padded), row)
    other = torch.rand(b, t, *rest)
    mask = packing.mask.reshape(b, t, *[1] * len(rest))
    assert torch.equal(packing.pad(packing.unpad(other)), other * mask)
    assert packing.is_row(row) == bool(rest)  # (1, t) has no features: it is one number for each of t examples


def test_gradients_pass_through_padding() -> None:
    packing = Packing.of([2, 5, 1])
    row = torch.rand(1, 8, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packing.pad, row)
    assert torch.autograd.gradcheck(packing.unpad, torch.rand(3, 5, 2, dtype=torch.float64, requires_grad=True))


def test_what_counts_as_a_row() -> None:
    packing = Packing.of([2, 3])
    assert packing.is_row(torch.ones(1, 5, 4))
    assert packing.is_row(torch.ones(1, 5, 2, 4))
    assert not packing.is_row(torch.ones(2, 5, 4))  # padded examples of five tokens
    assert not packing.is_row(torch.ones(2, 1, 4))  # first tokens
    assert not packing.is_row(torch.ones(1, 3, 4))
    assert not packing.is_row(torch.ones(2, 4))
    assert not packing.is_row(torch.ones(1, 5))


@given(any_lengths)
def test_moving(lengths: list[int]) -> None:
    packing = Packing.of(lengths)
    seen: list[Tensor] = []

    def move(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor.clone()

    moved = packing.apply(move)
    assert {id(tensor) for tensor in seen} == {id(packing.examples), id(packing.positions), id(packing.cu_seqlens)}
    assert moved.lengths == packing.lengths
    for name in ("examples", "positions", "cu_seqlens", "mask", "starts"):
        assert torch.equal(getattr(moved, name), getattr(packing, name))
        assert getattr(moved, name) is not getattr(packing, name)


# ------------------------------------------------------------------------------------------------------------------------
# Which examples are computed together.


def split_by(counts: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Lengths of the neighbours that are together."""
    assert sum(counts) == len(lengths)
    assert min(counts) >= 1
    ends = np.cumsum(counts).tolist()
    return [list(lengths[end - n : end]) for n, end in zip(counts, ends, strict=True)]


@given(any_lengths)
@example([64, 1])
@example([63, 1, 64])
@example([32, 32, 1])
@example([65])
def test_short_examples_go_together_up_to_a_bound(lengths: list[int]) -> None:
    packing = Packing.of(lengths)
    together = split_by(packing.short, lengths)
    assert all(len(group) == 1 or sum(group) <= SHORT for group in together)
    assert all(sum(group) + following[0] > SHORT for group, following in pairwise(together))
    assert packing.tokens_of(packing.short) == [sum(group) for group in together]


@given(any_lengths)
@example([40, 30, 29])
@example([32, 1, 33])
@example([33, 24])
@example([33, 25, 24])
@example([4, 5])
def test_examples_of_like_length_are_padded_together(lengths: list[int]) -> None:
    packing = Packing.of(lengths)
    together = split_by(packing.alike, lengths)

    def fits(length: int, first: int) -> bool:
        return length <= first and (length >= 0.75 * first or first <= SHORT / 2)

    assert all(fits(length, group[0]) for group in together for length in group)
    assert all(not fits(following[0], group[0]) for group, following in pairwise(together))
    assert [list(group.lengths) for group in packing.groups] == together
    for group, expected in zip(packing.groups, together, strict=True):
        assert torch.equal(group.positions, Packing.of(expected).positions)
        assert torch.equal(group.cu_seqlens, Packing.of(expected).cu_seqlens)


# ------------------------------------------------------------------------------------------------------------------------
# Who sees whom.


@given(any_lengths, windows, st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
@example([5, 5], 5, False, torch.float32)
@example([65], 65, False, torch.float32)
@example([66], 65, False, torch.float32)
@example([66], 65, True, torch.float32)
def test_a_token_sees_its_own_example_within_the_window(
    lengths: list[int], window: int | None, first_only: bool, dtype: torch.dtype
) -> None:
    packing = Packing.of(lengths)
    masks = packing.masks(window, first_only=first_only, dtype=dtype)
    assert packing.masks(window, first_only=first_only, dtype=dtype) is masks  # the layers share them
    everywhere = [(i, place) for i, n in enumerate(lengths) for place in range(n)]
    ends = np.cumsum(packing.tokens_of(packing.short)).tolist()
    for mask, start, end in zip(masks, [0, *ends], ends, strict=False):
        keys = everywhere[start:end]
        queries = [(i, place) for i, place in keys if place == 0 or not first_only]
        sees = [[i == j and (window is None or abs(a - b) < window) for j, b in keys] for i, a in queries]
        if mask is None:
            assert all(map(all, sees))
        else:
            assert not all(map(all, sees))
            assert mask.dtype == dtype
            assert mask.tolist() == [[0.0 if seen else -math.inf for seen in row] for row in sees]
    assert len(masks) == len(packing.short)


@given(any_lengths, windows)
def test_masks_for_first_tokens_are_rows_of_the_others(lengths: list[int], window: int | None) -> None:
    packing = Packing.of(lengths)
    whole = packing.masks(window, first_only=False, dtype=torch.float32)
    first = packing.masks(window, first_only=True, dtype=torch.float32)
    for full, rows, group in zip(whole, first, split_by(packing.short, lengths), strict=True):
        starts = np.cumsum([0, *group[:-1]])
        assert (full is None) == (rows is None)
        assert full is None or rows is None or torch.equal(full[starts], rows)


def test_layers_that_see_differently_share_no_mask() -> None:
    packing = Packing.of([5, 4])
    asked = [
        (window, first_only, dtype)
        for window in (None, 2, 3)
        for first_only in (False, True)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for window, first_only, dtype in asked:
        (found,) = packing.masks(window, first_only=first_only, dtype=dtype)
        (expected,) = Packing.of([5, 4]).masks(window, first_only=first_only, dtype=dtype)
        assert found is not None
        assert expected is not None
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


# ------------------------------------------------------------------------------------------------------------------------
# Attention inside each example, by every way there is.

HEADS, FEATURES, SCALING = 2, 8, 0.7


def made(lengths: Sequence[int], dtype: torch.dtype, first_only: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Query (1, h, t, d) or of first tokens (b, h, 1, d), key and value (1, h, t, d)."""
    draw = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(1, HEADS, sum(lengths), FEATURES, generator=draw, dtype=torch.float64).to(dtype) for _ in range(3)
    )
    if first_only:
        query = query[0][:, Packing.of(lengths).starts].transpose(0, 1).unsqueeze(2)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], window: int | None, first_only: bool
) -> Tensor:
    """What is expected, written down: each example by itself, in float64. Shapes as `packed_attention`."""
    found, start = [], 0
    for i, n in enumerate(lengths):
        q = (query[i] if first_only else query[0, :, start : start + n]).double()
        k, v = (x[0, :, start : start + n].double() for x in (key, value))
        scores = q @ k.mT * SCALING
        if window is not None:
            places = torch.arange(n)
            far = (places[: q.shape[1], None] - places).abs() >= window
            scores = scores.masked_fill(far, -math.inf)
        found.append((scores.softmax(-1) @ v).transpose(0, 1))  # (q, h, d)
        start += n
    return torch.stack(found) if first_only else torch.cat(found).unsqueeze(0)


class OnAGpu(TorchFunctionMode):
    """Tensors say that they are on a GPU; they are where they were."""

    device = torch.device("cuda", 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return self.device
        here = torch.device("cpu")
        args = [here if isinstance(a, torch.device) else a for a in args]
        kwargs = {name: here if isinstance(a, torch.device) else a for name, a in (kwargs or {}).items()}
        return func(*args, **kwargs)


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """What FlashAttention computes of examples in a row, in plain PyTorch: its window is counted from the last key."""
    for x in (query, key, value):
        assert x.dim() == 3
        assert x.stride(-1) == 1
        assert x.dtype in (torch.float16, torch.bfloat16)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key))
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    left, right = (side if side >= 0 else sys.maxsize // 4 for side in window_size)
    found = []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]].transpose(0, 1).float()
        k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]].transpose(0, 1).float() for x in (key, value))
        ahead = torch.arange(k.shape[1]) - (torch.arange(q.shape[1]) + k.shape[1] - q.shape[1])[:, None]
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores.masked_fill((ahead < -left) | (ahead > right), -math.inf)
        found.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(found).to(query.dtype)


Way = Callable[..., Tensor]


def on_a_gpu(patch: pytest.MonkeyPatch, kernel: str | None, capability: tuple[int, int] = (8, 0)) -> list[str]:
    """Pretend to one, with torch's kernel, FlashAttention's, or none. Returns the list of calls of the kernel."""
    calls: list[str] = []
    varlen = importlib.import_module("torch.nn.attention.varlen")

    def torchs(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        calls.append("torch")
        bounds = (cu_seq_q, cu_seq_k, max_q, max_k)
        return varlen_attn(query, key, value, *bounds, scale=scale, window_size=window_size)

    def of_torch_2_10(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        is_causal: bool = False,
        return_aux: Any = None,
    ) -> Tensor:
        raise AssertionError("it knows no window")

    def flash(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        assert not dropout_p
        assert not causal
        calls.append("flash_attn")
        bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return varlen_attn(q, k, v, *bounds, scale=softmax_scale, window_size=window_size)

    patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    patch.setattr(varlen, "varlen_attn", of_torch_2_10 if kernel == "flash_attn beside torch 2.10" else torchs)
    if kernel in (None, "flash_attn"):  # as before torch 2.10
        patch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    has_flash = kernel is not None and kernel.startswith("flash_attn")
    patch.setattr(attention, "find_spec", lambda name: object() if has_flash else None)
    patch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash) if has_flash else None)
    return calls


@pytest.fixture
def no_kernel_kept() -> Iterator[None]:
    attention._varlen_kernel.cache_clear()
    yield
    attention._varlen_kernel.cache_clear()


def compare(
    lengths: Sequence[int], window: int | None, first_only: bool, dtype: torch.dtype, tolerance: float, way: Way
) -> None:
    """Outputs and gradients of a way to compute attention against those of each example by itself."""
    inputs = made(lengths, dtype, first_only)
    found = way(*inputs, Packing.of(lengths), window, 0.0, None, SCALING)
    expected = one_by_one(*inputs, lengths, window, first_only)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = zip(
        torch.autograd.grad((found.double() * upstream).sum(), inputs),
        torch.autograd.grad((expected * upstream).sum(), inputs),
        strict=True,
    )
    for gradient, awaited in gradients:
        torch.testing.assert_close(gradient, awaited, rtol=tolerance, atol=3 * tolerance)


@settings(max_examples=60)
@given(any_lengths, windows, st.booleans())
@example([64, 1], None, False)
@example([1], None, True)
@example([1, 1, 1], 1, True)
@example([9], 3, True)
@example([9, 7], 7, False)
@example([70, 5], 65, True)
def test_a_cpu_attends_inside_each_example(lengths: list[int], window: int | None, first_only: bool) -> None:
    compare(lengths, window, first_only, torch.float64, 1e-9, packed_attention)


def pretended(*arguments: Any) -> Tensor:
    with OnAGpu():
        return packed_attention(*arguments)


CASES = [[9], [1], [1, 4], [3, 9, 7, 1], [8, 8, 8], [70, 64, 3, 65, 12]]


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 9, 65])
def test_another_device_attends_inside_each_example(
    window: int | None, first_only: bool, monkeypatch: pytest.MonkeyPatch, no_kernel_kept: None
) -> None:
    """In float32, where FlashAttention has no kernel."""
    calls = on_a_gpu(monkeypatch, "torch")
    for lengths in CASES:
        compare(lengths, window, first_only, torch.float64, 1e-9, pretended)
    assert not calls


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 9, 65])
@pytest.mark.parametrize("kernel", ["torch", "flash_attn", "flash_attn beside torch 2.10"])
def test_a_kernel_for_different_lengths_attends_inside_each_example(
    kernel: str, window: int | None, first_only: bool, monkeypatch: pytest.MonkeyPatch, no_kernel_kept: None
) -> None:
    calls = on_a_gpu(monkeypatch, kernel)
    for lengths in CASES if kernel == "torch" else CASES[2:4]:
        calls.clear()
        compare(lengths, window, first_only, torch.float16, 4e-3, pretended)
        if window is None or not (first_only or lengths == [1]):  # else the kernel's window would lie elsewhere
            assert calls == [kernel.split()[0]]


def test_both_half_precisions_take_the_kernel(monkeypatch: pytest.MonkeyPatch, no_kernel_kept: None) -> None:
    calls = on_a_gpu(monkeypatch, "torch")
    for dtype in (torch.bfloat16, torch.float16):
        compare([3, 9, 7], 3, False, dtype, 3e-2, pretended)
    assert calls == ["torch"] * 2


@pytest.mark.parametrize(("kernel", "capability"), [(None, (9, 0)), ("torch", (7, 5)), ("flash_attn", (7, 5))])
def test_a_device_without_a_kernel_pads(
    kernel: str | None, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch, no_kernel_kept: None
) -> None:
    calls = on_a_gpu(monkeypatch, kernel, capability)
    for window, first_only in ((None, False), (3, True), (4, False)):
        compare([3, 9, 7], window, first_only, torch.float16, 4e-3, pretended)
    assert not calls


def test_a_cpu_asks_for_no_kernel(monkeypatch: pytest.MonkeyPatch, no_kernel_kept: None) -> None:
    calls = on_a_gpu(monkeypatch, "torch")
    compare([3, 9, 7], None, False, torch.bfloat16, 3e-2, packed_attention)
    assert not calls
    assert attention._varlen_kernel(torch.device("cpu")) is None


@given(few, st.none() | st.integers(1, 9), st.booleans(), st.data())
def test_the_order_of_examples_does_not_matter(
    lengths: list[int], window: int | None, first_only: bool, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(lengths))))
    query, key, value = (x.detach() for x in made(lengths, torch.float64, first_only))

    def turned(x: Tensor, dim: int) -> Tensor:
        parts = x.split(lengths, dim)
        return torch.cat([parts[i] for i in order], dim)

    there = [lengths[i] for i in order]
    words = example_keys(np.arange(len(lengths)), seed=0, step=0)
    for p in (0.0, 0.4):
        keys = (words[:, 0], words[:, 1]) if p else None
        moved = (words[list(order), 0], words[list(order), 1]) if p else None
        here = packed_attention(query, key, value, Packing.of(lengths), window, p, keys, SCALING)
        shuffled = query[list(order)] if first_only else turned(query, 2)
        other = packed_attention(
            shuffled, turned(key, 2), turned(value, 2), Packing.of(there), window, p, moved, SCALING
        )
        expected = here[list(order)] if first_only else turned(here, 1)
        torch.testing.assert_close(other, expected, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------------------
# Dropout.


def site_keys(b: int, module: str = "layer.3.dropout") -> tuple[Tensor, Tensor]:
    forward_pass = ForwardPass()
    forward_pass.begin(example_keys(np.arange(b) * 7 + 3, seed=11, step=5))
    return forward_pass.at(Site(forward_pass, module))


@given(any_lengths, st.integers(1, 9), st.lists(st.integers(1, 3), max_size=1), st.floats(0.01, 0.99))
@example([1], 1, [], 0.5)
@example([1], 4, [2], 0.5)
@example([9], 7, [], 0.5)
@example([5, 5, 5], 8, [], 0.1)
def test_dropout_of_a_row_is_that_of_the_padded_examples(
    lengths: list[int], features: int, between: list[int], p: float
) -> None:
    packing, keys = Packing.of(lengths), site_keys(len(lengths))
    row = torch.rand(1, sum(lengths), *between, features) + 1
    packed, padded = drop(row, p, keys, packing), drop(packing.pad(row), p, keys)
    assert torch.equal(packed, packing.unpad(padded))
    for i, piece in enumerate(pieces(packed, lengths)):  # and of each of them alone
        alone = drop(row[:, packing.examples == i], p, (keys[0][i : i + 1], keys[1][i : i + 1]))
        assert torch.equal(alone[0], piece)
    starts = row[0, packing.starts]  # what is (b, …) is dropped as ever: first tokens, and what a head makes of them
    if between:
        assert torch.equal(drop(starts, p, keys, packing), drop(starts, p, keys))
    assert torch.equal(drop(starts[:, None], p, keys, packing)[:, 0], packed[0, packing.starts])


@given(few)
def test_a_site_in_a_packed_pass_drops_by_its_packing(lengths: list[int]) -> None:
    words, packing = example_keys(np.arange(len(lengths)), seed=1, step=2), Packing.of(lengths)
    found = []
    for given_packing in (packing, None):
        forward_pass = ForwardPass()
        forward_pass.begin(words, given_packing)
        row = torch.ones(1, sum(lengths), 5)
        x = row if given_packing else packing.pad(row)
        found.append(Site(forward_pass, "a").drop(x, 0.5))
    assert torch.equal(found[0], packing.unpad(found[1]))


@settings(max_examples=60)
@given(any_lengths, windows, st.booleans(), st.floats(0.05, 0.9))
@example([40, 29, 64, 1], 7, False, 0.3)
@example([40, 29, 64, 1], 7, True, 0.3)
@example([1], None, True, 0.5)
@example([9], None, False, 0.5)
@example([8, 8], 3, False, 0.5)
def test_attention_drops_the_weights_of_the_padded_examples(
    lengths: list[int], window: int | None, first_only: bool, p: float
) -> None:
    packing, keys = Packing.of(lengths), site_keys(len(lengths))
    query, key, value = made(lengths, torch.float64, False)
    k, v, q = (packing.pad(x.transpose(1, 2)).transpose(1, 2) for x in (key, value, query))
    places = torch.arange(packing.max_seqlen)
    near = (places[:, None] - places).abs() < (window or packing.max_seqlen)
    whole = explicit(q, k, v, packing.mask[:, None, None] & near, p, keys, SCALING).transpose(1, 2)  # (b, q, h, d)
    if first_only:
        query = query[0][:, packing.starts].transpose(0, 1).unsqueeze(2)
    found = packed_attention(query, key, value, packing, window, p, keys, SCALING)
    expected = whole[:, :1] if first_only else packing.unpad(whole)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_keyed_dropout_takes_no_kernel(monkeypatch: pytest.MonkeyPatch, no_kernel_kept: None) -> None:
    """On a GPU in half precision the masks are those of a CPU."""
    calls = on_a_gpu(monkeypatch, "torch")
    lengths = [3, 9, 7]
    inputs, keys = made(lengths, torch.bfloat16, False), site_keys(3)
    there = pretended(*inputs, Packing.of(lengths), 4, 0.3, keys, SCALING)
    here = packed_attention(*inputs, Packing.of(lengths), 4, 0.3, keys, SCALING)
    assert not calls
    torch.testing.assert_close(there, here, rtol=1e-2, atol=1e-2)


# ------------------------------------------------------------------------------------------------------------------------
# What models hand to `attend`.


def attend(lengths: Sequence[int], *, p: float = 0.0, training: bool = False, **handed: Any) -> Tensor:
    """`attention.attend` of a packed micro-batch, called by a module of no model."""
    forward_pass = ForwardPass()
    forward_pass.begin(example_keys(np.arange(len(lengths)), seed=0, step=0), Packing.of(lengths))
    module = torch.nn.Module().train(training)
    module.dropout_site = Site(forward_pass, "attention")
    for name in ("num_key_value_groups", "is_causal"):
        if name in handed:
            setattr(module, name, handed.pop(name))
    query, key, value = handed.pop("inputs", None) or made(lengths, torch.float64, False)
    found, weights = attention.attend(module, query, key, value, None, dropout=p, **handed)
    assert weights is None
    return found


def test_scaling_and_window_are_the_models() -> None:
    lengths = [4, 9, 1]
    inputs = made(lengths, torch.float64, False)
    found = attend(lengths, scaling=SCALING, sliding_window=3)
    torch.testing.assert_close(found, one_by_one(*inputs, lengths, 3, False))
    usual = attend(lengths)  # the inverse root of the features of a head
    query, key, value = inputs
    expected = one_by_one(query * (FEATURES**-0.5 / SCALING), key, value, lengths, None, False)
    torch.testing.assert_close(usual, expected)


def test_only_training_drops() -> None:
    lengths = [4, 9, 1]
    still = attend(lengths, scaling=SCALING)
    assert torch.equal(attend(lengths, p=0.5, scaling=SCALING), still)
    assert not torch.allclose(attend(lengths, p=0.5, training=True, scaling=SCALING), still)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_queries_may_share_a_key(p: float) -> None:
    lengths = [4, 9, 1]
    query, key, value = made(lengths, torch.float64, False)
    query = torch.cat([query, query.flip(1)], 1)
    shared = attend(lengths, p=p, training=True, inputs=(query, key, value), num_key_value_groups=2)
    repeated = (query, key[:, [0, 0, 1, 1]], value[:, [0, 0, 1, 1]])
    assert torch.equal(shared, attend(lengths, p=p, training=True, inputs=repeated))


@pytest.mark.parametrize(
    ("handed", "message"),
    [
        ({"is_causal": True}, "a decoder's attention cannot be packed"),
        ({"softcap": 30.0}, "bends its attention scores"),
        ({"position_bias": torch.zeros(1)}, "bends its attention scores"),
    ],
)
def test_what_is_not_known_is_refused(handed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        attend([4, 2], **handed)


def test_a_decoder_is_refused_however_it_says_so() -> None:
    forward_pass = ForwardPass()
    forward_pass.begin(None, Packing.of([4, 2]))
    module = torch.nn.Module().eval()
    module.dropout_site, module.is_causal = Site(forward_pass, "a"), False  # type: ignore[assignment]
    inputs = made([4, 2], torch.float64, False)
    with pytest.raises(UserError, match="a decoder's attention"):
        attention.attend(module, *inputs, None, is_causal=True)
    module.is_causal = True  # type: ignore[assignment]
    with pytest.raises(UserError, match="a decoder's attention"):
        attention.attend(module, *inputs, None)
    attention.attend(module, *inputs, None, is_causal=False)


def test_a_packed_row_has_no_mask() -> None:
    """None is made, on whatever device: attention knows by itself what belongs together."""
    assert attention.padding_mask(attention_mask=None) is None

"""Attention with keyed dropout is softmax times mask; how examples are kept apart in one row is in `test_packing.py`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from harness import FAMILIES, SIZES
from keyed import ROWS, batch, build, dropped, gradients, keys_of, step_of, strays_of, words
from torch import Tensor, nn

from accel_trainer.attention import ATTENTION, attend, install
from accel_trainer.classifier import Classifier
from accel_trainer.dropout import ForwardPass, Site, drop
from accel_trainer.errors import UserError


class Attends(nn.Module):
    """An attention module as far as transformers' interface knows it."""

    is_causal = False

    def __init__(self, rows: Sequence[int] = (3, 1, 4), name: str = "attention") -> None:
        super().__init__()
        self.forward_pass = ForwardPass()
        self.forward_pass.begin(words(rows=rows))
        self.dropout_site = Site(self.forward_pass, name)


def draw_attention(b: int = 3, h: int = 2, q: int = 5, k: int = 5, d: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(b, h, q, d), (b, h, k, d), (b, h, k, d)]
    return [torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes]


def by_hand(parts: Sequence[Tensor], visible: Tensor, p: float, scaling: float) -> Tensor:
    """Attention as its definition says, one query at a time: (b, q, h, d)."""
    query, key, value = parts
    b, h, q, d = query.shape
    k = key.shape[2]
    drops = torch.from_numpy(dropped((h, q, k), p, [3, 1, 4], step=0, module="attention"))
    kept = (~drops).double() * (65536 / (65536 - round(p * 65536)))
    results = []
    for i, j, n in itertools.product(range(b), range(q), range(h)):
        seen = visible[i, j].nonzero()[:, 0]
        weights = (key[i, n, seen] @ query[i, n, j] * scaling).exp()
        results.append((weights / weights.sum() * kept[i, n, j, seen]) @ value[i, n, seen])
    return torch.stack(results).reshape(b, q, h, d)


LENGTHS_OF_KEYS = torch.tensor([5, 2, 4])
PADDED = (torch.arange(5) < LENGTHS_OF_KEYS[:, None])[:, None, None]  # (3, 1, 1, 5)
NEAR = (torch.arange(5)[:, None] - torch.arange(5)).abs() <= 1


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("case", ["all", "padded", "padded by query", "window", "causal", "causal by argument"])
def test_attention_is_softmax_times_mask(case: str, scaling: float | None, p: float) -> None:
    module, parts = Attends(), draw_attention()
    arguments: dict[str, Any] = {}
    mask: Tensor | None = None
    visible = torch.ones(3, 5, 5, dtype=torch.bool)
    if case.startswith("padded"):
        mask = PADDED if case == "padded" else PADDED.expand(3, 1, 5, 5)
        visible = PADDED.expand(3, 1, 5, 5)[:, 0]
    elif case == "window":
        mask = NEAR[None, None]
        visible = NEAR.expand(3, 5, 5)
    elif case.startswith("causal"):
        visible = torch.ones(5, 5, dtype=torch.bool).tril().expand(3, 5, 5)
        module.is_causal = case == "causal"
        arguments = {} if case == "causal" else {"is_causal": True}
    output, weights = attend(module, *parts, mask, dropout=p, scaling=scaling, **arguments)
    assert weights is None
    assert output.is_contiguous()
    expected = by_hand(parts, visible, p, 0.5 if scaling is None else scaling)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-14)
    above = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(output, parts, above)
    theirs = torch.autograd.grad(expected, parts, above)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def test_without_dropout_or_in_evaluation_attention_is_the_fused_one() -> None:
    parts = draw_attention()
    plain = nn.functional.scaled_dot_product_attention(*parts, attn_mask=PADDED).transpose(1, 2)
    module = Attends()
    for training, p in ((True, 0.0), (False, 0.5)):
        output, _ = attend(module.train(training), *parts, PADDED, dropout=p)
        assert torch.equal(output, plain)
    dropping, _ = attend(module.train(), *parts, PADDED, dropout=1e-4)
    assert not torch.equal(dropping, plain)
    # And what the explicit path computes is that, but for the mask: with one that keeps nearly all, nearly the same.
    torch.testing.assert_close(dropping, plain, rtol=0, atol=1e-3)


def test_a_query_that_sees_no_key_gives_numbers() -> None:
    """As a padded token does that stands farther from any real one than ModernBERT's window reaches."""
    visible = NEAR & (torch.arange(5) < 2)  # queries 3 and 4 see nothing
    assert (visible.sum(-1) == 0).tolist() == [False, False, False, True, True]
    parts = draw_attention()
    output, _ = attend(Attends(), *parts, visible[None, None], dropout=0.5)
    assert output.isfinite().all()
    gradient = torch.autograd.grad(output.sum(), parts)
    assert all(part.isfinite().all() for part in gradient)
    seen, _ = attend(Attends(), *parts, visible[None, None], dropout=0.5)
    expected = by_hand([parts[0][:, :, :3], *parts[1:]], visible[:3].expand(3, 3, 5), 0.5, 0.5)
    torch.testing.assert_close(seen[:, :3], expected, rtol=0, atol=1e-14)


def test_a_query_that_sees_no_key_gives_numbers_in_float16_too() -> None:
    query, key, value = (part.detach().half() for part in draw_attention())
    key = -key.abs() - 1
    query = torch.full_like(query, 6.0)  # scores near -21
    output, _ = attend(Attends(), query, key, value, torch.zeros(1, 1, 5, 5, dtype=torch.bool), dropout=0.5)
    assert output.isfinite().all()


def test_a_mask_may_be_numbers_to_add() -> None:
    parts = draw_attention()
    numbers = torch.zeros(PADDED.shape, dtype=torch.float64).masked_fill(~PADDED, -math.inf)
    truths, added = (attend(Attends(), *parts, mask, dropout=0.5)[0] for mask in (PADDED, numbers))
    assert torch.equal(truths, added)
    bias = torch.randn(3, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    plain = nn.functional.scaled_dot_product_attention(*parts, attn_mask=bias).transpose(1, 2)
    nearly, _ = attend(Attends(), *parts, bias, dropout=1e-5)  # one level: none of these 150 weights falls
    torch.testing.assert_close(nearly, plain * (65536 / 65535), rtol=0, atol=1e-14)


def test_what_is_masked_has_no_weight_at_all() -> None:
    parts = draw_attention()
    changed = [part.detach().clone() for part in parts]
    for part in changed[1:]:
        part[1, :, 2:] = 1e6  # padding of the second example
    outputs = [attend(Attends(), *some, PADDED, dropout=0.5)[0] for some in (parts, changed)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_types_are_normalized_in_float32(dtype: torch.dtype) -> None:
    parts = [part.detach().to(dtype) for part in draw_attention(k=5)]
    output, _ = attend(Attends(), *parts, PADDED, dropout=0.5)
    assert output.dtype == dtype
    wide, _ = attend(Attends(), *[part.double() for part in parts], PADDED, dropout=0.5)
    torch.testing.assert_close(output.double(), wide, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("bend", ["softcap", "position_bias"])
def test_scores_that_are_bent_are_refused(bend: str) -> None:
    with pytest.raises(UserError, match=r"model\.attention_dropout: .* set the key to 0\.0"):
        attend(Attends(), *draw_attention(), None, dropout=0.5, **{bend: torch.ones(1)})


def test_grouped_queries_share_their_keys() -> None:
    query = draw_attention(h=4)[0]
    key, value = draw_attention(h=2)[1:]
    module = Attends()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    output, _ = attend(module, query, key, value, None, dropout=0.5)
    repeated = [part.repeat_interleave(2, 1) for part in (key, value)]
    assert torch.equal(output, attend(Attends(), query, *repeated, None, dropout=0.5)[0])


@pytest.mark.parametrize(("before", "installed"), [("sdpa", True), ("eager", False), (ATTENTION, True)])
def test_it_is_installed_where_torch_would_compute_attention(before: str, installed: bool) -> None:
    """A second time too, as on a model that is trained again; whoever chose another one keeps it."""
    model = build("bert")
    model.set_attn_implementation(before)
    assert install(model) is installed
    assert model.config._attn_implementation == (ATTENTION if installed else before)


def test_attention_of_the_model_s_own_is_left_as_it_is() -> None:
    model = build("mpnet")  # which knows of no other
    before = model.config._attn_implementation
    assert install(model) is False
    assert model.config._attn_implementation == before


def test_attention_that_bends_its_scores_is_left_as_it_is() -> None:
    """Gemma 2 caps them, which torch's fused attention cannot: its own stays, and is found to draw."""
    sizes = {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32}
    stock, ours = build("gemma2", **sizes), Classifier(build("gemma2", **sizes))
    assert ours.model.config._attn_implementation == stock.config._attn_implementation == "eager"
    with torch.no_grad():
        assert torch.equal(ours.eval()(batch(range(4))), stock.eval()(**batch(range(4))).logits)
    assert strays_of(ours, batch(range(4))) == math.inf


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_hidden_states_have_dropout_each(family: str) -> None:
    evaluated = Classifier(build(family)).eval()(batch(range(4)))
    for hidden, attention in ((0.1, 0.0), (0.0, 0.1)):
        classifier = Classifier(build(family, hidden, attention))
        assert (step_of(classifier, range(4))[0] - evaluated).abs().amin() > 1e-9
    classifier = Classifier(build(family, 0.0, 0.0))
    torch.testing.assert_close(step_of(classifier, range(4))[0], evaluated, rtol=0, atol=1e-12)


def test_attention_in_a_model_is_its_eager_one_with_our_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' own explicit attention, with our masks in the place of torch's."""
    classifier, stock = Classifier(build("bert", hidden=0.0)), build("bert", hidden=0.0).train()
    logits, found = step_of(classifier, range(4))
    stock.set_attn_implementation("eager")
    layers = iter(range(2))
    torch_dropout = nn.functional.dropout

    def keyed(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if x.dim() != 4:
            return torch_dropout(x, p, training, inplace)
        assert p == 0.1
        module = f"bert.encoder.layer.{next(layers)}.attention.self"
        return drop(x, p, keys_of(ROWS, seed=1, step=5, module=module))

    monkeypatch.setattr(nn.functional, "dropout", keyed)
    expected = stock(**batch(range(4))).logits
    assert next(layers, None) is None
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    (expected * torch.tensor([[0.5], [1.0], [-1.0], [2.0]])).square().sum().backward()
    for name, gradient in gradients(stock).items():
        torch.testing.assert_close(found[f"model.{name}"], gradient, rtol=0, atol=1e-12)

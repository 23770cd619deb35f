"""A classifier gives the same packed as padded, and as the stock model: logits, gradients, and what it leaves behind."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from harness import FAMILIES, SIZES, Outcome, alone_on_the_cpu, run_trainer, write_recipe_in
from safetensors.torch import load_file
from support import reviews
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from accel_trainer import dropout
from accel_trainer.classifier import PACKED, Classifier, strays
from accel_trainer.data import Split
from accel_trainer.errors import UserError
from accel_trainer.evaluation import predict_logits
from accel_trainer.last_layer import FIRST_TOKEN_LAYERS
from accel_trainer.layout import choose_layout, why_unpacked
from accel_trainer.model import DROPOUT_NAMES
from accel_trainer.predict import load_predictor
from accel_trainer.tokenization import OFFSET_POSITIONS, Batch, Tokens

CPU = torch.device("cpu")
LENGTHS = (9, 3, 16, 1, 7, 16)

# Variant → family, and what its config has besides. ModernBERT's windows, of four tokens to each side, are shorter than the
# texts; every third of its layers sees everything, the first and the fourth.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "modernbert mean": ("modernbert", {"classifier_pooling": "mean"}),
    "modernbert, last layer global": ("modernbert", {"num_hidden_layers": 4}),
    "modernbert with biases": ("modernbert", {"attention_bias": True, "mlp_bias": True, "norm_bias": True}),
}


def build(family: str, p: float = 0.0, sizes: dict[str, Any] | None = None, **more: Any) -> PreTrainedModel:
    """A tiny classifier whose dropouts are all p; the same weights each time, large enough that everything matters."""
    attention = {"attn_implementation": more.pop("attn_implementation")} if "attn_implementation" in more else {}
    sizes = {"vocab_size": 50, "num_labels": 3, **(FAMILIES[family] if sizes is None else sizes), **more}
    pad = 1 if family in OFFSET_POSITIONS else 0
    config = AutoConfig.for_model(family, **{"pad_token_id": pad, **sizes})
    for name in {name for names in DROPOUT_NAMES.values() for name in names}:
        if hasattr(config, name):
            setattr(config, name, p)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, **attention)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            fan_in = weight.shape[1] if weight.dim() == 2 and "embedding" not in name else 4
            centre = 1.0 if weight.dim() == 1 and name.endswith("weight") else 0.0
            weight.normal_(centre, fan_in**-0.5, generator=draw)
        for module in model.modules():  # MobileBERT reads the padding beside a text's last token as if it were nothing
            if family == "mobilebert" and isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
    return model.train()


def tokens(
    config: Any, lengths: Sequence[int] = LENGTHS, *, pairs: bool = False, spelled: Sequence[int] = (), seed: int = 0
) -> Tokens:
    """Texts of these lengths; those in `spelled` hold the padding token here and there, as text."""
    draw, pad = np.random.default_rng(seed), config.pad_token_id
    ids = [[*draw.integers(5, 50, n - 1).tolist(), 2] for n in lengths]  # BART's end is 2
    for i in spelled:
        ids[i] = [pad if draw.random() < 0.5 else token for token in ids[i]]
        ids[i][-1] = pad
    columns: dict[str, Any] = {"input_ids": ids}
    if pairs:
        columns["token_type_ids"] = [[int(place > n // 3) for place in range(n)] for n in lengths]
    return Tokens(columns, np.asarray(lengths), 0, pad)


def takes_pairs(config: Any) -> bool:
    return getattr(config, "type_vocab_size", 0) > 1


def keys(b: int) -> Tensor:
    return dropout.example_keys(np.arange(b) * 5 + 2, seed=1, step=2)


def results(model: nn.Module, logits: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Logits, and the gradients of a sum of them, each of its own weight, by the stock names."""
    model.zero_grad(set_to_none=True)
    found = logits()
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (found.double() * weights).sum().backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return found.detach(), {name.removeprefix("model."): gradient for name, gradient in gradients.items()}


def in_layout(classifier: Classifier, batch: Batch, b: int) -> tuple[Tensor, dict[str, Tensor | None]]:
    return results(classifier, lambda: classifier(batch.inputs, keys(b), batch.packing))


def assert_same(
    found: tuple[Tensor, dict[str, Tensor | None]],
    expected: tuple[Tensor, dict[str, Tensor | None]],
    *,
    logits: float = 1e-5,
    gradients: float = 1e-4,
) -> None:
    """Logits to an absolute difference; gradients to one relative to the largest of their tensor."""
    assert float(expected[0].std()) > 0.05  # not a tie of zeros
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=logits)
    for one in (found[1], expected[1]):
        for name, gradient in one.items():
            if gradient is not None and not gradient.any():
                one[name] = None
    scale = max(float(gradient.abs().max()) for gradient in expected[1].values() if gradient is not None)
    compared = 0
    for (name, gradient), (other_name, other) in zip(found[1].items(), expected[1].items(), strict=True):
        assert name.removeprefix("model.") == other_name.removeprefix("model.")
        if name.endswith(("key.bias", "k_lin.bias")):  # adds the same to all scores of a query: its true gradient is 0
            assert all(g is None or float(g.abs().max()) < gradients * scale for g in (gradient, other))
            continue
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            difference = float((gradient - other).abs().max() / other.abs().max())
            assert difference < gradients, f"{name}: {difference:.1e}"
            compared += 1
    assert compared > 8


def is_last_layer_windowed(config: Any) -> bool:
    return cast(str, config.layer_types[-1]) == "sliding_attention"


def test_the_families_are_those_that_need_no_trial() -> None:
    assert set(FAMILIES) == PACKED == set(FIRST_TOKEN_LAYERS)
    assert is_last_layer_windowed(build("modernbert").config)
    assert not is_last_layer_windowed(build("modernbert", num_hidden_layers=4).config)


# ------------------------------------------------------------------------------------------------------------------------
# Packed, padded, stock.


@pytest.mark.parametrize("pairs", [False, True], ids=["texts", "pairs"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_is_padded(variant: str, p: float, pairs: bool) -> None:
    family, more = VARIANTS[variant]
    classifier = Classifier(build(family, p, **more))
    if pairs and not takes_pairs(classifier.model.config):
        return
    assert classifier.is_known
    classifier.train()
    texts, rows = tokens(classifier.model.config, pairs=pairs), np.arange(len(LENGTHS))
    packed = in_layout(classifier, texts.batch(rows, packed=True), len(rows))
    padded = in_layout(classifier, texts.batch(rows, packed=False), len(rows))
    assert_same(packed, padded)
    if p:  # masks do something
        still = Classifier(build(family, **more)).train()
        without = in_layout(still, texts.batch(rows, packed=True), len(rows))
        assert (packed[0] - without[0]).abs().max() > 0.05


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_both_are_the_stock_model(variant: str, packed: bool, training: bool) -> None:
    family, more = VARIANTS[variant]
    stock = build(family, 0.0 if training else 0.3, **more).train(training)
    classifier = Classifier(copy.deepcopy(stock)).train(training)
    pairs, rows = takes_pairs(stock.config), np.arange(len(LENGTHS))
    texts = tokens(stock.config, pairs=pairs)
    padded = texts.inputs(rows)
    expected = results(stock, lambda: stock(**padded).logits)
    assert_same(in_layout(classifier, texts.batch(rows, packed=packed), len(rows)), expected)
    # What was compared knows of windows, of segments, and of places.
    with torch.no_grad():
        mixed = {**padded, "input_ids": padded["input_ids"].clone()}
        mixed["input_ids"][0, 1:8] = padded["input_ids"][0, 1:8].flip(0)
        assert (stock(**mixed).logits - expected[0]).abs().max() > 1e-3
        if pairs:
            mixed = {**padded, "token_type_ids": 1 - padded["token_type_ids"]}
            assert (stock(**mixed).logits - expected[0]).abs().max() > 1e-3
        if family == "modernbert":
            wide = build(family, 0.0, **{**more, "local_attention": 10}).eval()
            assert (wide(**padded).logits - expected[0]).abs().max() > 1e-3


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("lengths", [(1,), (12,), (1, 1, 1), (8, 8, 8), (2, 1, 3, 1), (30, 31, 4, 29, 1, 5)], ids=str)
@pytest.mark.parametrize("variant", ["bert", "roberta", "albert", "modernbert", "modernbert mean"])
def test_any_lengths(variant: str, lengths: tuple[int, ...], p: float) -> None:
    """One example, one token, all alike, and more than go into one call of attention."""
    family, more = VARIANTS[variant]
    classifier = Classifier(build(family, p, **more)).train()
    texts, rows = tokens(classifier.model.config, lengths), np.arange(len(lengths))
    with torch.no_grad():
        packed = in_no_time(classifier, texts.batch(rows, packed=True))
        padded = in_no_time(classifier, texts.batch(rows, packed=False))
        torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)
        for i in rows:  # each by itself
            one = texts.batch(rows[i : i + 1], packed=True)
            alone = classifier(one.inputs, keys(len(lengths))[i : i + 1], one.packing)
            torch.testing.assert_close(alone[0], padded[i], rtol=0, atol=1e-5)


def in_no_time(classifier: Classifier, batch: Batch) -> Tensor:
    b = len(batch.packing.lengths) if batch.packing else len(batch.inputs["input_ids"])
    with torch.no_grad():
        logits: Tensor = classifier(batch.inputs, keys(b), batch.packing)
    return logits


@pytest.mark.parametrize("variant", ["bert", "modernbert", "modernbert mean"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_texts_around_what_goes_into_one_call(variant: str, p: float) -> None:
    lengths = (63, 1, 64, 65, 33, 32, 31, 66)
    family, more = VARIANTS[variant]
    stock = build(family, p, max_position_embeddings=80, **more)
    classifier = Classifier(copy.deepcopy(stock))
    texts, rows = tokens(stock.config, lengths), np.arange(len(lengths))
    packed = in_layout(classifier, texts.batch(rows, packed=True), len(rows))
    assert_same(packed, in_layout(classifier, texts.batch(rows, packed=False), len(rows)))
    if not p:
        assert_same(packed, results(stock, lambda: stock(**texts.inputs(rows)).logits))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_may_spell_out_the_padding_token(family: str, p: float) -> None:
    """RoBERTa's positions leave it out, wherever it stands; and it is read as any other."""
    stock = build(family, p)
    classifier = Classifier(copy.deepcopy(stock))
    texts, rows = tokens(stock.config, (9, 4, 12, 1, 6), spelled=[1, 2, 3]), np.arange(5)
    packed = in_layout(classifier, texts.batch(rows, packed=True), len(rows))
    assert_same(packed, in_layout(classifier, texts.batch(rows, packed=False), len(rows)))
    if not p:
        assert_same(packed, results(stock, lambda: stock(**texts.inputs(rows)).logits))


@pytest.mark.parametrize("variant", VARIANTS)
def test_neighbours_do_not_matter(variant: str) -> None:
    """In training, another order and other texts beside it leave an example what it is."""
    family, more = VARIANTS[variant]
    classifier = Classifier(build(family, 0.3, **more))
    texts = tokens(classifier.model.config)
    others = tokens(classifier.model.config, seed=1)
    there = in_no_time(classifier, texts.batch(np.arange(6), packed=True))
    order = np.asarray([4, 0, 5, 2])
    batch = texts.batch(order, packed=True)
    with torch.no_grad():
        here = classifier(batch.inputs, keys(6)[order], batch.packing)
    torch.testing.assert_close(here, there[order], rtol=0, atol=1e-5)
    columns = cast(dict[str, list[list[int]]], texts.columns)
    mixed = Tokens({"input_ids": [*others.columns["input_ids"]]}, texts.lengths, 0, texts.pad_token_id)  # type: ignore[misc]
    mixed.columns["input_ids"][2] = columns["input_ids"][2]  # type: ignore[index]
    beside = in_no_time(classifier, mixed.batch(np.arange(6), packed=True))
    torch.testing.assert_close(beside[2], there[2], rtol=0, atol=1e-5)
    assert (beside[0] - there[0]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_are_given_no_mask_of_a_row(variant: str) -> None:
    """Nobody needs it, and it would be the square of all examples."""
    family, more = VARIANTS[variant]
    classifier = Classifier(build(family, 0.3, **more))
    masks: list[Tensor | None] = []

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        masks.append(named.get("attention_mask", given[1] if len(given) > 1 else None))

    layers = [m for m in classifier.modules() if type(m).__name__.endswith(("Layer", "Block"))]
    for layer in layers:
        layer.register_forward_pre_hook(note, with_kwargs=True)
    texts, rows = tokens(classifier.model.config), np.arange(len(LENGTHS))
    in_no_time(classifier, texts.batch(rows, packed=True))
    assert len(masks) >= 2
    assert masks == [None] * len(masks)
    masks.clear()
    in_no_time(classifier, texts.batch(rows, packed=False))
    assert None not in [mask if mask is None else 0 for mask in masks]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_run_asks_before_it_trains(family: str) -> None:
    """The seven families pass the trial that they are spared."""
    classifier = Classifier(build(family, 0.2))
    texts, rows = tokens(classifier.model.config), np.asarray([3, 0, 5])
    alone = [texts.batch(rows[i : i + 1], packed=False) for i in range(3)]
    for packed in (True, False):
        assert strays(classifier, texts.batch(rows, packed=packed), alone) < 1e-5


# ------------------------------------------------------------------------------------------------------------------------
# With what comes on top.


def count_calls(classifier: Classifier, first_layer: nn.Module) -> tuple[list[int], RemovableHandle]:
    linear = next(module for module in first_layer.modules() if isinstance(module, nn.Linear))
    calls: list[int] = []
    return calls, linear.register_forward_hook(lambda *_: calls.append(1))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "albert"])
def test_gradient_checkpointing(variant: str, packed: bool) -> None:
    family, more = VARIANTS[variant]
    plain, recomputing = build(family, 0.3, **more), build(family, 0.3, **more)
    recomputing.gradient_checkpointing_enable({"use_reentrant": False})
    texts, rows = tokens(plain.config), np.arange(len(LENGTHS))
    batch = texts.batch(rows, packed=packed)
    expected = in_layout(Classifier(plain), batch, len(rows))
    classifier = Classifier(recomputing).train()
    layers = next(m for m in recomputing.modules() if isinstance(m, nn.ModuleList))
    calls, hook = count_calls(classifier, layers[0])
    found = in_layout(classifier, batch, len(rows))
    hook.remove()
    assert len(calls) == 2  # it is computed twice
    assert_same(found, expected, logits=1e-6, gradients=1e-5)
    # And micro-batch after micro-batch, of other shapes.
    other = tokens(plain.config, (4, 5), seed=9).batch(np.arange(2), packed=packed)
    in_layout(classifier, other, 2)
    assert_same(in_layout(classifier, batch, len(rows)), expected, logits=1e-6, gradients=1e-5)


def test_albert_cannot_be_checkpointed() -> None:
    with pytest.raises(ValueError, match=r"does not support \w+ checkpointing"):
        build("albert").gradient_checkpointing_enable({"use_reentrant": False})


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_precision(variant: str, p: float) -> None:
    family, more = VARIANTS[variant]
    classifier = Classifier(build(family, p, **more))
    texts, rows = tokens(classifier.model.config), np.arange(len(LENGTHS))
    found = []
    for packed in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(in_layout(classifier, texts.batch(rows, packed=packed), len(rows)))
    (packed_logits, packed_gradients), (padded_logits, padded_gradients) = found
    exact = in_layout(classifier, texts.batch(rows, packed=True), len(rows))[0]
    size = float(exact.abs().max())
    assert (packed_logits - padded_logits).abs().max() < 2e-2 * max(1.0, size)
    assert 0 < (packed_logits - exact).abs().max() < 5e-2 * max(1.0, size)
    norms = [
        torch.stack([g.norm() for g in gradients.values() if g is not None]).norm()
        for gradients in (packed_gradients, padded_gradients)
    ]
    assert norms[0] == pytest.approx(float(norms[1]), rel=2e-2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation(variant: str) -> None:
    """All rows of a split, in micro-batches, in both layouts, in the mode that the model had."""
    family, more = VARIANTS[variant]
    stock = build(family, 0.3, **more).eval()
    classifier = Classifier(copy.deepcopy(stock)).train()
    lengths = np.random.default_rng(0).integers(1, 25, 20)
    texts = tokens(stock.config, lengths.tolist(), pairs=takes_pairs(stock.config))
    accelerator = SimpleNamespace(device=CPU, num_processes=1, process_index=0, gather=lambda tensor: tensor)
    with torch.no_grad():
        alone = [stock(**texts.inputs(np.asarray([i]))).logits[0] for i in range(20)]
    for packed in (True, False):
        found = predict_logits(cast(Any, accelerator), classifier, texts, 60, packed=packed)
        np.testing.assert_allclose(found, torch.stack(alone).numpy(), rtol=0, atol=1e-5)
    assert classifier.training


# ------------------------------------------------------------------------------------------------------------------------
# Nothing is left behind.


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_is_the_stock_model(variant: str, tmp_path: Path) -> None:
    family, more = VARIANTS[variant]
    stock = build(family, 0.3, **more)
    stock.save_pretrained(tmp_path / "stock")
    names, dump = list(stock.state_dict()), stock.config.to_json_string()
    classifier = Classifier(stock)
    texts, rows = tokens(stock.config), np.arange(3)
    in_layout(classifier, texts.batch(rows, packed=True), 3)
    assert list(stock.state_dict()) == names
    parameters = [name for name, _ in build(family, 0.3, **more).named_parameters()]
    assert [name for name, _ in stock.named_parameters()] == parameters
    assert stock.config.to_json_string() == dump
    stock.save_pretrained(tmp_path / "wrapped")
    assert files(tmp_path / "wrapped") == files(tmp_path / "stock")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "wrapped")
    assert type(again) is type(stock)
    assert again.config._attn_implementation == "sdpa"
    assert all("forward" not in vars(module) for module in again.modules())
    assert all(not hasattr(module, "dropout_site") for module in again.modules())
    assert {type(m) for m in again.modules() if isinstance(m, nn.Dropout)} <= {nn.Dropout}
    with torch.no_grad():
        expected = in_no_time(classifier.eval(), texts.batch(rows, packed=True))
        torch.testing.assert_close(again.eval()(**texts.inputs(rows)).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_copy_has_its_own(variant: str) -> None:
    family, more = VARIANTS[variant]
    first = Classifier(build(family, 0.3, **more))
    texts, rows = tokens(first.model.config), np.arange(len(LENGTHS))
    batch = texts.batch(rows, packed=True)
    expected = in_layout(first, batch, len(rows))
    first(batch.inputs, keys(len(rows)), batch.packing)  # in use when it is copied
    copied = copy.deepcopy(first.model)
    second = Classifier(copied)
    mine, its = set(map(id, first.modules())), set(map(id, second.modules()))
    assert not mine & its
    for module in copied.modules():
        for value in (vars(module).get("forward"), getattr(module, "dropout_site", None)):
            held = [] if value is None else [v for v in vars(value).values() if isinstance(v, nn.Module)]
            assert all(id(v) in its for v in held)
            within = getattr(value, "within", getattr(value, "forward_pass", second.forward_pass))
            assert within is second.forward_pass
    first.zero_grad(set_to_none=True)
    with torch.no_grad():
        for weight in first.parameters():
            weight.zero_()
    assert_same(in_layout(second, batch, len(rows)), expected, logits=1e-7, gradients=1e-6)
    assert all(weight.grad is None for weight in first.parameters())
    # The original's passes know nothing of the copy's.
    assert first.forward_pass.packing is batch.packing
    second.eval()(texts.inputs(rows[:2]))
    assert second.forward_pass.packing is None
    assert first.forward_pass.packing is batch.packing


@pytest.mark.parametrize("variant", VARIANTS)
def test_wrapping_twice_is_wrapping_once(variant: str) -> None:
    family, more = VARIANTS[variant]
    once, model = Classifier(build(family, 0.3, **more)), build(family, 0.3, **more)
    Classifier(model)
    twice = Classifier(model)
    assert twice.is_known
    texts, rows = tokens(model.config), np.arange(len(LENGTHS))
    for packed in (True, False):
        batch = texts.batch(rows, packed=packed)
        assert_same(in_layout(twice, batch, 6), in_layout(once, batch, 6), logits=1e-7, gradients=1e-6)
        assert torch.equal(in_no_time(twice, batch), in_no_time(once, batch))


# ------------------------------------------------------------------------------------------------------------------------
# Which models are packed.

WIDE = {**SIZES, "max_position_embeddings": 40}
BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
    "eos_token_id": 2,
}
XLM = {"emb_dim": 16, "n_layers": 2, "n_heads": 2}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2}
MOBILEBERT = {**WIDE, "intra_bottleneck_size": 8, "embedding_size": 8, "num_feedforward_networks": 1}
DECODER = {**SIZES, "max_position_embeddings": 32, "local_attention": 8, "global_attn_every_n_layers": 2}
# Family → its config, its dropouts, and why it is not packed; None: it is.
OTHERS: dict[str, tuple[dict[str, Any], float, str | None]] = {
    "camembert": (WIDE, 0.1, None),
    "ernie": (WIDE, 0.1, None),
    "layoutlm": (WIDE, 0.1, None),
    "eurobert": ({**WIDE, "num_key_value_heads": 1}, 0.1, None),
    "mpnet": (WIDE, 0.1, "its attention is its own"),
    "deberta-v2": (WIDE, 0.1, "its attention is its own"),
    "roformer": (WIDE, 0.1, "its attention is its own"),
    "xlm": (XLM, 0.0, "its attention is its own"),
    "mobilebert": (MOBILEBERT, 0.1, "its logits move by "),
    "bart": (BART, 0.0, "it fails: model: a decoder's attention cannot be packed"),
    "gpt2": (GPT2, 0.1, "it fails: model: a decoder's attention cannot be packed"),
    "modernbert-decoder": (DECODER, 0.1, "it fails: model: a decoder's attention cannot be packed"),
}


class Texts:
    """A training split, as far as the choice of the layout looks at it."""

    def __init__(self, config: Any, lengths: Sequence[int] = (4, 9, 6, 12, 12, 3, 7, 16)) -> None:
        self.tokens = tokens(config, lengths)

    def __len__(self) -> int:
        return len(self.tokens)


def choose(classifier: Classifier, layout: str, device: torch.device = CPU) -> bool:
    return choose_layout(classifier, cast(Split, Texts(classifier.model.config)), layout, device)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_tried(family: str, caplog: pytest.LogCaptureFixture) -> None:
    sizes, p, reason = OTHERS[family]
    stock = build(family, p, sizes)
    classifier = Classifier(copy.deepcopy(stock))
    assert not classifier.is_known
    caplog.set_level("INFO")
    assert choose(classifier, "padded") is False
    assert choose(classifier, "auto", torch.device("xla")) is False
    assert "trained padded" not in caplog.text
    assert choose(classifier, "auto") is (reason is None)
    if reason is None:
        assert "trained padded" not in caplog.text
        assert choose(classifier, "packed") is True
    else:
        assert f"a {family} classifier is trained padded: packed, {reason}" in caplog.text
        with pytest.raises(UserError, match=f"--layout packed: a {family} classifier cannot be packed") as refused:
            choose(classifier, "packed")
        assert reason in str(refused.value)
        assert refused.value.exit_code == 2
    # In the layout that it gets, it is the stock model.
    texts, rows = tokens(stock.config, (4, 9, 6, 12)), np.arange(4)
    with torch.no_grad():
        expected = stock.eval()(**texts.inputs(rows)).logits
    found = in_no_time(classifier.eval(), texts.batch(rows, packed=reason is None))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", [family for family, (_, _, reason) in OTHERS.items() if reason is None])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_families_that_pass_the_trial_deserve_it(family: str, p: float) -> None:
    sizes, _, _ = OTHERS[family]
    stock = build(family, p, sizes)
    classifier = Classifier(copy.deepcopy(stock))
    texts, rows = tokens(stock.config), np.arange(len(LENGTHS))
    packed = in_layout(classifier, texts.batch(rows, packed=True), len(rows))
    assert_same(packed, in_layout(classifier, texts.batch(rows, packed=False), len(rows)))
    if not p:
        assert_same(packed, results(stock, lambda: stock(**texts.inputs(rows)).logits))


@pytest.mark.parametrize("family", FAMILIES)
def test_known_families_are_not_tried(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = Classifier(build(family, 0.1))
    monkeypatch.setattr("accel_trainer.layout.strays", lambda *_: pytest.fail("tried"))
    assert choose(classifier, "auto") is True
    assert choose(classifier, "packed") is True
    assert choose(classifier, "padded") is False
    assert choose(classifier, "auto", torch.device("xla")) is False  # it compiles each new length
    assert choose(classifier, "packed", torch.device("xla")) is True


@pytest.mark.parametrize("family", ["bert", "albert", "modernbert"])
def test_a_model_that_asks_for_its_own_attention_keeps_it(family: str) -> None:
    stock = build(family, attn_implementation="eager").eval()
    classifier = Classifier(copy.deepcopy(stock)).eval()
    assert not classifier.can_pack
    assert not classifier.is_known
    assert classifier.model.config._attn_implementation == "eager"
    assert choose(classifier, "auto") is False
    with pytest.raises(UserError, match=r"cannot be packed \(its attention is its own\)"):
        choose(classifier, "packed")
    texts, rows = tokens(stock.config), np.arange(len(LENGTHS))
    expected = results(stock, lambda: stock(**texts.inputs(rows)).logits)
    assert_same(in_layout(classifier, texts.batch(rows, packed=False), len(rows)), expected)


def test_a_decoder_of_a_known_family_is_none_of_it() -> None:
    classifier = Classifier(build("bert", 0.1, is_decoder=True))
    assert classifier.can_pack
    assert not classifier.is_known
    reason = why_unpacked(classifier, cast(Split, Texts(classifier.model.config)), np.arange(3))
    assert reason == "it fails: model: a decoder's attention cannot be packed"


def test_what_computes_in_chunks_is_tried() -> None:
    """Chunks of a row are not those of the examples, and each is a call of its dropout."""
    classifier = Classifier(build("bert", 0.1, chunk_size_feed_forward=1))
    assert not classifier.is_known
    assert choose(classifier, "auto") is False
    with pytest.raises(UserError, match="cannot be packed"):
        choose(classifier, "packed")
    assert Classifier(build("bert", 0.1, chunk_size_feed_forward=0)).is_known


def test_a_difference_or_none_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = Classifier(build("camembert", 0.1, WIDE))
    split = cast(Split, Texts(classifier.model.config))
    for difference, reason in ((9e-5, None), (2e-3, "its logits move by 2e-03"), (math.inf, "its logits move by inf")):
        monkeypatch.setattr("accel_trainer.layout.strays", lambda *_, difference=difference: difference)
        assert why_unpacked(classifier, split, np.arange(3)) == reason

    def fails(*_: Any) -> float:
        raise RuntimeError("the first line\nthe second")

    monkeypatch.setattr("accel_trainer.layout.strays", fails)
    assert why_unpacked(classifier, split, np.arange(3)) == "it fails: the first line"

    def fails_without_a_word(*_: Any) -> float:
        raise KeyError

    monkeypatch.setattr("accel_trainer.layout.strays", fails_without_a_word)
    assert why_unpacked(classifier, split, np.arange(3)) == "it fails: KeyError"


def run_of(family: str, sizes: dict[str, Any], folder: Path, *arguments: str) -> Outcome:
    model = {"from_config": {"model_type": family, **sizes}, "train_tokenizer": {"vocab_size": 200}}
    dataset = {"splits": {"train": 16, "validation": 8, "test": 8}}
    recipe = write_recipe_in(folder, rows=32, model=model, dataset=dataset)
    return run_trainer(recipe, folder / "run", *arguments)


def test_the_command_line_says_what_is_not_packed(tmp_path: Path) -> None:
    refused = run_of("roformer", WIDE, tmp_path / "packed", "--layout", "packed")
    assert refused.code == 2
    told = "--layout packed: a roformer classifier cannot be packed (its attention is its own); leave the option out"
    assert told in refused.err
    padded = run_of("roformer", WIDE, tmp_path / "auto")
    assert padded.code == 0
    assert "note: a roformer classifier is trained padded: packed, its attention is its own" in padded.out + padded.err
    assert padded.json("run.json")["layout"] == "padded"


def test_a_run_and_its_predictions(tmp_path: Path) -> None:
    """Trained packed, the model labels texts as the stock model that is loaded from its folder does."""
    made = run_of("bert", {**SIZES, "max_position_embeddings": 16}, tmp_path)
    assert made.code == 0
    assert made.json("run.json")["layout"] == "packed"
    folder = made.folder / "model"
    stock = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert stock.config._attn_implementation == "sdpa"
    names = set(stock.state_dict())
    assert set(load_file(folder / "model.safetensors")) == names
    texts = [text for text, _ in reviews(12, seed=5)]
    with alone_on_the_cpu(tmp_path / "cache"):
        predictor = load_predictor(str(made.folder))
        found, pairs = predictor.logits(texts), predictor.logits(texts, texts[::-1])
    assert predictor.model.is_known
    for i, text in enumerate(texts):
        for logits, given in ((found, (text,)), (pairs, (text, texts[-1 - i]))):
            one = tokenizer(*given, truncation=True, max_length=16, return_tensors="pt")
            with torch.no_grad():
                np.testing.assert_allclose(logits[i], stock(**one).logits[0].numpy(), rtol=0, atol=1e-5)

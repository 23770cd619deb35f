"""What the last layer makes of first tokens is the first row of what the stock layer makes of all of them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from harness import FAMILIES
from test_packed_families import assert_same, build, in_layout, keys, results, takes_pairs, tokens
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.models.bert.modeling_bert import BertForSequenceClassification

from accel_trainer import last_layer
from accel_trainer.classifier import Classifier
from accel_trainer.last_layer import LastLayer, reads_first_token_only
from accel_trainer.tokenization import Batch

ONE_GROUP = {"num_hidden_groups": 1}
# Name → family, and what its config has besides.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    **{
        f"{family}, one layer": (family, {"n_layers" if family == "distilbert" else "num_hidden_layers": 1})
        for family in FAMILIES
    },
    **{
        f"{family} in chunks": (family, {"chunk_size_feed_forward": 1})
        for family in ("bert", "distilbert", "roberta", "electra", "albert")
    },
    "bert of four heads": ("bert", {"num_attention_heads": 4}),
    "modernbert, last layer global": ("modernbert", {"num_hidden_layers": 4}),
    "modernbert with biases": ("modernbert", {"attention_bias": True, "mlp_bias": True, "norm_bias": True}),
    "modernbert, one layer with biases": ("modernbert", {"num_hidden_layers": 1, "attention_bias": True}),
    "modernbert of four heads": ("modernbert", {"num_attention_heads": 4}),
    "modernbert with a window of one": ("modernbert", {"local_attention": 2}),
    **{
        f"albert of {layers} layers, {groups} groups of {inner}": (
            "albert",
            {"num_hidden_layers": layers, "num_hidden_groups": groups, "inner_group_num": inner},
        )
        for layers, groups, inner in [
            (1, 1, 2),
            (2, 2, 1),
            (3, 1, 1),
            (3, 1, 2),
            (3, 2, 1),
            (4, 2, 2),
            (7, 3, 2),
            (3, 3, 1),
            (1, 2, 1),
            (3, 4, 1),
            (3, 5, 2),
        ]
    },
}
LENGTHS = (9, 3, 16, 1, 7)


def last_of(model: PreTrainedModel) -> nn.Module:
    """The module whose output the head is given: the one that was called last, of all that are called so."""
    if model.config.model_type == "albert":
        config = model.config
        group = int((config.num_hidden_layers - 1) / (config.num_hidden_layers / config.num_hidden_groups))
        return model.albert.encoder.albert_layer_groups[group].albert_layers[-1]
    if model.config.model_type == "modernbert":
        return model.model.layers[-1]
    if model.config.model_type == "distilbert":
        return model.distilbert.transformer.layer[-1]
    return model.base_model.encoder.layer[-1]


def output(classifier: Classifier, batch: Batch, b: int) -> Tensor:
    """What the last layer returns when it is called for the last time."""
    seen: list[Tensor] = []
    hook = last_of(classifier.model).register_forward_hook(lambda module, given, returned: seen.append(returned))
    with torch.no_grad():
        classifier(batch.inputs, keys(b), batch.packing)
    hook.remove()
    return seen[-1] if isinstance(seen[-1], Tensor) else seen[-1][0]


def whole(classifier: Classifier) -> Classifier:
    """The same with its stock last layer, which computes all rows; its dropout is keyed."""
    del last_of(classifier.model).forward
    return classifier


def layouts(more: dict[str, Any], p: float) -> list[bool]:
    """Packed and padded; what drops chunk by chunk is not packed, see `Classifier.is_known`."""
    return [False] if p and "chunk_size_feed_forward" in more else [True, False]


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("name", CONFIGS)
def test_first_tokens_are_the_first_row_of_the_stock_layer(name: str, p: float) -> None:
    family, more = CONFIGS[name]
    classifier = Classifier(build(family, p, **more)).train().double()
    stock = whole(copy.deepcopy(classifier))
    texts = tokens(classifier.model.config, LENGTHS, pairs=takes_pairs(classifier.model.config))
    alone = [np.asarray([2])] if name in FAMILIES else []
    for rows in (np.arange(len(LENGTHS)), np.asarray([3]), np.asarray([2, 2, 2]), *alone):
        padded = texts.batch(rows, packed=False)
        expected = output(stock, padded, len(rows))
        assert expected.shape == (len(rows), texts.lengths[rows].max(), 16)
        for packed in layouts(more, p):
            found = output(classifier, texts.batch(rows, packed=packed), len(rows))
            assert found.shape == (len(rows), 1, 16)
            torch.testing.assert_close(found, expected[:, :1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in FAMILIES])
def test_gradients_are_those_of_the_stock_layer(name: str, p: float) -> None:
    family, more = CONFIGS[name]
    model = build(family, p, **more).double()
    classifier, rows = Classifier(copy.deepcopy(model)), np.arange(len(LENGTHS))
    texts = tokens(model.config, LENGTHS)
    expected = in_layout(whole(copy.deepcopy(classifier)), texts.batch(rows, packed=False), len(rows))
    for packed in layouts(more, p):
        assert_same(in_layout(classifier, texts.batch(rows, packed=packed), len(rows)), expected)
    if not p:
        assert_same(expected, results(model, lambda: model(**texts.inputs(rows)).logits))


def test_the_mean_is_taken_of_all_rows() -> None:
    model = build("modernbert", 0.3, classifier_pooling="mean")
    classifier, rows = Classifier(model).train(), np.arange(len(LENGTHS))
    texts = tokens(model.config, LENGTHS)
    packed = output(classifier, texts.batch(rows, packed=True), len(rows))
    padded = output(classifier, texts.batch(rows, packed=False), len(rows))
    assert packed.shape == padded.shape == (5, 16, 16)
    mask = texts.inputs(rows)["attention_mask"].bool()
    torch.testing.assert_close(packed[mask], padded[mask], rtol=1e-5, atol=1e-5)
    assert not packed[~mask].any()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", ["bert", "distilbert", "albert", "modernbert", "albert of 3 layers, 2 groups of 1"])
def test_the_rest_of_the_last_layer_is_not_computed(name: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what makes a layer's time: its matrix products, and its queries."""
    family, more = CONFIGS[name]
    classifier = Classifier(build(family, **more))
    texts, rows = tokens(classifier.model.config, LENGTHS), np.arange(len(LENGTHS))
    linears = [m for m in last_of(classifier.model).modules() if isinstance(m, nn.Linear) and m.out_features != 16]
    assert linears  # from the layer's width to the inner one
    shapes: list[torch.Size] = []
    for linear in linears:
        linear.register_forward_hook(lambda module, given, returned: shapes.append(given[0].shape))
    queries: list[int] = []

    def attends(query: Tensor, *arguments: Any, **named: Any) -> Tensor:
        queries.append(query.numel() // query.shape[1] // query.shape[3])
        return scaled_dot_product_attention(query, *arguments, **named)

    monkeypatch.setattr("accel_trainer.attention.scaled_dot_product_attention", attends)
    batch = texts.batch(rows, packed=packed)
    classifier(batch.inputs, None, batch.packing)
    assert shapes[-1] == (5, 1, 16)
    if packed:
        assert queries[-1] == 5
        assert queries[0] == sum(LENGTHS)


class Meaning(BertForSequenceClassification):
    """A head of somebody's own, which reads every token."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **named: Any) -> Any:
        hidden = self.bert(input_ids, attention_mask=attention_mask, **named).last_hidden_state
        mean = (hidden * attention_mask.unsqueeze(-1)).sum(1) / attention_mask.sum(1, keepdim=True)
        return type("Output", (), {"logits": self.classifier(mean)})


def test_only_heads_of_transformers_are_known_to_read_the_first_token() -> None:
    stock = build("bert")
    assert reads_first_token_only(stock)
    assert reads_first_token_only(build("modernbert"))
    assert not reads_first_token_only(build("modernbert", classifier_pooling="mean"))
    own = Meaning(stock.config)
    own.load_state_dict(stock.state_dict())
    assert not reads_first_token_only(own)
    classifier, rows = Classifier(copy.deepcopy(own)), np.arange(len(LENGTHS))
    assert not classifier.is_known
    texts = tokens(own.config, LENGTHS)
    expected = results(own, lambda: own(**texts.inputs(rows)).logits)
    for packed in (True, False):
        assert_same(in_layout(classifier, texts.batch(rows, packed=packed), len(rows)), expected)


@pytest.mark.parametrize(
    ("layers", "groups", "inner", "number", "calls"),
    [
        (1, 1, 1, 0, 1),
        (4, 1, 1, 0, 4),
        (3, 2, 1, 1, 1),
        (4, 2, 2, 1, 2),
        (5, 3, 1, 2, 1),
        (7, 3, 1, 2, 2),
        (1, 2, 1, 0, 1),
        (3, 5, 2, 3, 1),
    ],
)
def test_the_last_layer_of_albert(layers: int, groups: int, inner: int, number: int, calls: int) -> None:
    model = build("albert", num_hidden_layers=layers, num_hidden_groups=groups, inner_group_num=inner)
    layer = model.albert.encoder.albert_layer_groups[number].albert_layers[-1]
    assert last_layer._last(model) == (layer, calls)
    Classifier(model)
    replaced = [module for module in model.modules() if isinstance(vars(module).get("forward"), LastLayer)]
    assert replaced == [layer]
    times: list[nn.Module] = []
    layer.register_forward_hook(lambda module, *_: times.append(module))
    with torch.no_grad():
        model(**tokens(model.config, (3, 4)).inputs(np.arange(2)))
    assert len(times) == calls


class Layer(nn.Module):
    """One that takes other things than BERT's, in another order."""

    def forward(self, hidden_states: Tensor, bias: Tensor, attention_mask: Any = None, scale: float = 1.0) -> Any:
        assert attention_mask == "mask"
        return hidden_states * scale + bias


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_layers_of_other_families_are_called_as_they_are(packed: bool) -> None:
    classifier = Classifier(build("bert"))
    forward_pass = classifier.forward_pass
    batch = tokens(classifier.model.config, (2, 3)).batch(np.arange(2), packed=packed)
    forward_pass.begin(None, batch.packing)
    layer = Layer()
    layer.forward = LastLayer(layer, None, 1, forward_pass)  # type: ignore[method-assign,assignment]
    hidden, bias = torch.rand(*batch.inputs["input_ids"].shape, 4), torch.rand(4)
    expected = hidden * 2 + bias
    if batch.packing is not None:
        expected = batch.packing.pad(expected)
    for found in (
        layer(hidden, bias, "mask", 2.0),
        layer(hidden, bias, attention_mask="mask", scale=2.0),
        layer(hidden_states=hidden, attention_mask="mask", bias=bias, scale=2.0),
    ):
        assert torch.equal(found, expected)


def test_what_else_a_layer_returns_is_handed_on() -> None:
    forward_pass = Classifier(build("bert")).forward_pass
    batch = tokens(build("bert").config, (2, 3)).batch(np.arange(2), packed=True)
    forward_pass.begin(None, batch.packing)

    class Telling(nn.Module):
        def forward(self, hidden: Tensor) -> tuple[Tensor, str]:
            return hidden, "weights"

    layer = Telling()
    layer.forward = LastLayer(layer, None, 1, forward_pass)  # type: ignore[method-assign,assignment]
    hidden = torch.rand(1, 5, 4)
    found, told = layer(hidden)
    assert batch.packing is not None
    assert torch.equal(found, batch.packing.pad(hidden))
    assert told == "weights"

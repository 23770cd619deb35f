"""The classifier is the stock model but for its dropout and its layout, and knows when a model draws of its own."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harness import FAMILIES
from keyed import strays_of
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from accel_trainer import dropout
from accel_trainer.classifier import Classifier
from accel_trainer.layout import ROUNDING
from accel_trainer.model import DROPOUT_NAMES
from accel_trainer.packing import Packing

XLM = {"emb_dim": 16, "n_layers": 2, "n_heads": 2}
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
XLNET = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}


def build(family: str, p: float, sizes: dict[str, Any], **more: Any) -> PreTrainedModel:
    """A tiny classifier whose dropouts are all p, the same weights each time."""
    config = AutoConfig.for_model(family, vocab_size=50, num_labels=3, pad_token_id=0, **sizes)
    for name in {name for names in DROPOUT_NAMES.values() for name in names}:
        if hasattr(config, name):
            setattr(config, name, p)
    for name, value in more.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return model


def inputs(*lengths: int) -> dict[str, Tensor]:
    """Examples of these lengths, each ending with the token 2, as BART needs it."""
    longest = max(lengths)
    draw = np.random.default_rng(0)
    rows = [[*draw.integers(5, 50, n - 1).tolist(), 2] + [0] * (longest - n) for n in lengths]
    mask = [[1] * n + [0] * (longest - n) for n in lengths]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def keys(*rows: int) -> Tensor:
    return dropout.example_keys(np.asarray(rows), seed=1, step=2)


@pytest.fixture
def classifier() -> Classifier:
    return Classifier(build("bert", 0.1, FAMILIES["bert"]))


def test_weights_are_those_of_the_stock_model(classifier: Classifier) -> None:
    stock = build("bert", 0.1, FAMILIES["bert"])
    assert list(classifier.state_dict()) == [f"model.{name}" for name in stock.state_dict()]
    assert all(
        torch.equal(a, b) for a, b in zip(classifier.state_dict().values(), stock.state_dict().values(), strict=True)
    )
    inner = list(classifier.model.parameters())
    assert all(a is b for a, b in zip(classifier.parameters(), inner, strict=True))
    assert list(classifier.buffers()) == list(classifier.model.buffers())


def test_logits_in_evaluation_need_no_keys_and_ignore_them(classifier: Classifier) -> None:
    stock = build("bert", 0.1, FAMILIES["bert"]).eval()
    logits = classifier.eval()(inputs(5, 9))
    assert logits.shape == (2, 3)
    torch.testing.assert_close(logits, stock(**inputs(5, 9)).logits, rtol=0, atol=1e-6)
    assert torch.equal(logits, classifier(inputs(5, 9), keys(3, 4)))


def test_training_needs_keys(classifier: Classifier) -> None:
    classifier.train()
    with pytest.raises(AssertionError, match="needs the keys of its examples"):
        classifier(inputs(5, 9))
    once = classifier(inputs(5, 9), keys(3, 4))
    with pytest.raises(AssertionError, match="needs the keys of its examples"):
        classifier(inputs(5, 9))  # those of the last pass are not used again
    assert torch.equal(once, classifier(inputs(5, 9), keys(3, 4)))
    assert not torch.equal(once, classifier(inputs(5, 9), keys(3, 5)))
    Classifier(build("bert", 0.0, FAMILIES["bert"])).train()(inputs(5, 9))  # where nothing is dropped, none are missed


def test_evaluation_between_steps_changes_no_mask(classifier: Classifier) -> None:
    once = classifier.train()(inputs(5, 9), keys(3, 4))
    classifier.eval()(inputs(4, 7, 7))
    assert torch.equal(once, classifier.train()(inputs(5, 9), keys(3, 4)))


def test_keys_are_in_force_until_the_next_forward_pass(classifier: Classifier) -> None:
    """The backward pass computes layers again under gradient checkpointing, with the keys of its forward pass."""
    held = classifier.forward_pass
    assert held.words is None
    assert not held.replaying
    given = keys(3, 4)
    seen: list[bool] = []
    classifier.model.classifier.register_forward_hook(lambda *_: seen.append(held.replaying))
    classifier.train()(inputs(5, 9), given)
    assert seen == [False]
    assert held.replaying
    assert held.words is given
    classifier.eval()(inputs(5, 9))
    assert held.words is None


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_the_recipes_draw_nothing(family: str, packed: bool) -> None:
    """Run.py does not try them, because they pass."""
    classifier = Classifier(build(family, 0.1, FAMILIES[family]))
    assert classifier.is_known
    assert strays_of(classifier, inputs(5, 9, 12), packed=packed) < ROUNDING / 10


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_changes_only_rounding(family: str) -> None:
    """Trained or evaluated, and in whatever order the layouts come."""
    classifier = Classifier(build(family, 0.1, FAMILIES[family]).double())
    padded, given = inputs(5, 9, 4), keys(3, 4, 7)
    row = {"input_ids": padded["input_ids"][padded["attention_mask"] == 1].unsqueeze(0)}
    for training in (True, False):
        classifier.train(training)
        logits = classifier(padded, given)
        packed = classifier(row, given, Packing.of([5, 9, 4]))
        torch.testing.assert_close(packed, logits, rtol=0, atol=1e-6)  # some compute parts of attention in float32
        assert torch.equal(classifier(padded, given), logits)


def test_known_are_the_families_as_transformers_has_them() -> None:
    """What decodes, or was changed by someone, is tried before it is trained."""
    assert Classifier(build("bert", 0.1, FAMILIES["bert"])).is_known
    assert not Classifier(build("bert", 0.1, FAMILIES["bert"], is_decoder=True)).is_known
    assert not Classifier(build("camembert", 0.1, FAMILIES["roberta"])).is_known
    theirs = build("bert", 0.1, FAMILIES["bert"])
    theirs.__class__ = type("Changed", (type(theirs),), {"__module__": "transformers_modules.someone.modeling"})
    assert not Classifier(theirs).is_known
    eager = build("bert", 0.1, FAMILIES["bert"])
    eager.set_attn_implementation("eager")
    classifier = Classifier(eager)
    assert not classifier.can_pack
    assert not classifier.is_known


def test_encoders_that_draw_are_found_out() -> None:
    assert strays_of(Classifier(build("xlm", 0.1, XLM)), inputs(5, 9)) > ROUNDING
    assert strays_of(Classifier(build("bart", 0.1, BART)), inputs(5, 9)) > ROUNDING


def test_without_dropout_they_are_welcome() -> None:
    assert strays_of(Classifier(build("xlm", 0.0, XLM)), inputs(5, 9)) < ROUNDING
    assert strays_of(Classifier(build("bart", 0.0, BART)), inputs(5, 9)) < ROUNDING


class Drawing(nn.Module):
    """A classifier with functional dropout, in training as modules of old have it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 3)
        self.config = SimpleNamespace(_attn_implementation="eager")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        hidden = nn.functional.dropout(input_ids.double().float().unsqueeze(-1), 0.5, self.training)
        return SimpleNamespace(logits=self.linear(hidden).mean(1))


def test_functional_dropout_is_found_out() -> None:
    assert strays_of(Classifier(Drawing()), inputs(12, 9)) > ROUNDING  # type: ignore[arg-type]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", ["bert", "xlm"])
def test_asking_leaves_no_trace(family: str, training: bool) -> None:
    """Mode, torch's and other random streams, gradients, weights, and the masks of the next pass."""
    made = Classifier(build(family, 0.1, {**FAMILIES, "xlm": XLM}[family])).train(training)
    weights = {name: weight.clone() for name, weight in made.state_dict().items()}
    modes = [module.training for module in made.modules()]
    torch.manual_seed(5)
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    strays_of(made, inputs(5, 9))
    assert [module.training for module in made.modules()] == modes
    assert torch.equal(streams[0], torch.get_rng_state())
    assert streams[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert all(parameter.grad is None for parameter in made.parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in made.state_dict().items())
    if family == "bert":
        fresh = Classifier(build("bert", 0.1, FAMILIES["bert"]))
        assert torch.equal(made.train()(inputs(5, 9), keys(3, 4)), fresh.train()(inputs(5, 9), keys(3, 4)))


def test_an_encoder_that_keeps_examples_on_another_axis_is_found_out() -> None:
    for longest in (8, 9):
        assert strays_of(Classifier(build("xlnet", 0.1, XLNET)), inputs(4, 4, longest)) > ROUNDING


SHAPES = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "max_position_embeddings": 32}


@pytest.mark.parametrize(("family", "sizes"), [("fnet", SHAPES), ("convbert", {**SHAPES, "num_attention_heads": 2})])
def test_an_encoder_that_padding_reaches_is_found_out(family: str, sizes: dict[str, Any]) -> None:
    """FNet mixes all positions, ConvBERT neighbouring ones, whether they are padding or not."""
    assert strays_of(Classifier(build(family, 0.0, sizes)), inputs(4, 8, 12)) > ROUNDING


@pytest.mark.parametrize(
    ("family", "sizes", "more"),
    [("xlm", XLM, {"attention_dropout": 0.05}), ("bart", BART, {"encoder_layerdrop": 0.5})],
)
def test_rare_draws_are_found_out_too(family: str, sizes: dict[str, Any], more: dict[str, float]) -> None:
    assert strays_of(Classifier(build(family, 0.0, sizes, **more)), inputs(6, 9, 12)) > ROUNDING


def test_logits_that_are_no_numbers_are_for_training_to_complain_of() -> None:
    made = Classifier(build("bert", 0.1, FAMILIES["bert"]))
    torch.nn.init.constant_(made.model.classifier.bias, float("nan"))
    assert strays_of(made, inputs(3, 5)) == 0.0

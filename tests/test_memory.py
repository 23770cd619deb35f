"""What training will take in memory is counted: exactly where shapes decide it, closely where a forward pass does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from harness import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from accel_trainer import dropout, memory
from accel_trainer.classifier import Classifier
from accel_trainer.memory import (
    Extent,
    MemoryNeeds,
    kept_activations,
    optimizer_bytes,
    prediction_needs,
    training_needs,
)
from accel_trainer.optim import build_optimizer, parameter_groups
from accel_trainer.packing import Packing
from accel_trainer.recipe import TrainingSection
from accel_trainer.tokenization import Batch

LENGTHS = [31, 24, 24, 9, 5]


def classifier_of(family: str, attention_dropout: float = 0.0, **more: Any) -> Classifier:
    arguments = {**FAMILIES[family], "max_position_embeddings": 128, "vocab_size": 50, "pad_token_id": 0, **more}
    special = dict.fromkeys(["bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"], 1)
    config = AutoConfig.for_model(family, **arguments, **(special if family == "modernbert" else {}))
    for name in ("attention_probs_dropout_prob", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, attention_dropout)
    torch.manual_seed(0)
    return Classifier(AutoModelForSequenceClassification.from_config(config))


def batch_of(lengths: list[int], *, packed: bool) -> Batch:
    if packed:
        return Batch({"input_ids": torch.full((1, sum(lengths)), 3)}, Packing.of(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return Batch({"input_ids": torch.full(mask.shape, 3), "attention_mask": mask.long()}, None)


def saved_bytes(classifier: Classifier, lengths: list[int], *, packed: bool) -> int:
    """What autograd keeps of a real micro-batch, each storage once, the parameters left out."""
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    classifier.train()
    batch = batch_of(lengths, packed=packed)
    keys = dropout.example_keys(np.arange(len(lengths)), seed=1, step=2)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = classifier(batch.inputs, keys, batch.packing)
    assert logits.requires_grad
    own = {tensor.data_ptr() for tensor in [*classifier.parameters(), *classifier.buffers()]}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    return sum(size for address, size in storages.items() if address not in own)


@pytest.mark.parametrize("attention_dropout", [0.0, 0.1])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_forward_pass_keeps(family: str, packed: bool, attention_dropout: float) -> None:
    classifier = classifier_of(family, attention_dropout)
    fixed, kept = kept_activations(classifier, 128, packed=packed)
    expected = fixed + Extent.of(np.asarray(LENGTHS), packed=packed).times(kept)
    assert expected == pytest.approx(saved_bytes(classifier, LENGTHS, packed=packed), rel=0.25)


@pytest.mark.parametrize("packed", [True, False])
def test_texts_of_one_length_are_counted_exactly(packed: bool) -> None:
    classifier = classifier_of("distilbert", 0.1)
    fixed, kept = kept_activations(classifier, 128, packed=packed)
    expected = fixed + Extent.of(np.full(5, 40), packed=packed).times(kept)
    lengths = [40] * 5 if packed else [40, 40, 39, 39, 39]
    assert expected == pytest.approx(saved_bytes(classifier, lengths, packed=packed), rel=0.01)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "albert"])
def test_checkpointing_keeps_less(family: str) -> None:
    classifier = (
        classifier_of(family, num_hidden_layers=12) if family != "distilbert" else classifier_of(family, n_layers=12)
    )
    whole = training_needs(classifier, "sgd", 128, packed=True)
    classifier.model.gradient_checkpointing_enable({"use_reentrant": False})
    less = training_needs(classifier, "sgd", 128, packed=True)
    assert less.kept.tokens < whole.kept.tokens / 2
    assert less.layer == whole.layer
    assert any(getattr(module, "gradient_checkpointing", False) for module in classifier.modules())


def test_frozen_layers_keep_nothing() -> None:
    classifier = classifier_of("bert")
    before = kept_activations(classifier, 128, packed=True)[1].tokens
    for module in (classifier.model.bert.embeddings, classifier.model.bert.encoder.layer[0]):
        module.requires_grad_(False)
    assert kept_activations(classifier, 128, packed=True)[1].tokens < before / 2


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_weights_gradients_and_optimizer_are_exact(optim: Any) -> None:
    classifier = classifier_of("bert")
    classifier.model.bert.embeddings.requires_grad_(False)
    needs = training_needs(classifier, optim, 128, packed=True)
    section = TrainingSection(global_batch_size=4, max_steps=1, learning_rate=1e-3, optim=optim)
    optimizer = build_optimizer(parameter_groups(classifier.model, section), section, torch.device("cpu"))
    batch = batch_of([7, 5], packed=True)
    classifier.train()(batch.inputs, dropout.example_keys(np.arange(2), seed=0, step=0), batch.packing).sum().backward()
    parameters = list(classifier.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.requires_grad]
    optimizer.step()
    state = [
        value
        for entries in optimizer.state.values()
        for name, value in entries.items()
        if isinstance(value, Tensor) and name != "step" and value.dim()
    ]
    assert needs.weights == sum(parameter.nbytes for parameter in parameters)
    assert needs.gradients == sum(gradient.nbytes for gradient in gradients if gradient is not None)
    assert needs.optimizer == sum(value.nbytes for value in state)
    assert (needs.optimizer == 0) is (optim == "sgd")


def test_several_processes_hold_gradients_twice() -> None:
    classifier = classifier_of("bert")
    alone, two = (training_needs(classifier, "sgd", 128, packed=True, num_processes=count) for count in (1, 2))
    assert two.gradients == 2 * alone.gradients
    assert two.weights == alone.weights


def test_shares_are_divided_and_some_weights_are_whole() -> None:
    classifier = classifier_of("bert", num_hidden_layers=4)
    model = classifier.model
    model.bert.embeddings.requires_grad_(False)
    alone = training_needs(classifier, "adamw_torch", 128, packed=True)
    four = training_needs(classifier, "adamw_torch", 128, packed=True, num_processes=4, sharded=True)
    assert four.gradients == alone.gradients // 4
    assert four.optimizer == alone.optimizer // 4
    layer = sum(parameter.nbytes for parameter in model.bert.encoder.layer[0].parameters())
    assert (
        four.weights == alone.weights // 4 + alone.weights - 2 * layer
    )  # of four layers two are never whole beside the rest
    assert four.kept == alone.kept


def test_without_layers_of_its_own_a_model_is_whole_at_once() -> None:
    classifier = classifier_of("albert")
    assert memory.whole_at_once(classifier) == sum(parameter.numel() for parameter in classifier.parameters())


def test_half_precision_keeps_less_and_casts_the_weights() -> None:
    classifier = classifier_of("bert", intermediate_size=512)
    fixed, whole = kept_activations(classifier, 128, packed=True)
    cast, half = kept_activations(classifier, 128, packed=True, mixed_precision="bf16")
    assert half.tokens < whole.tokens
    assert cast > fixed + 512 * 16 * 2 * 2  # the feed-forward's weights, in two bytes


def test_nothing_is_left_behind() -> None:
    classifier = classifier_of("bert").eval()
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    training_needs(classifier, "adamw_torch", 128, packed=True)
    assert torch.equal(torch.randn(3), expected)
    assert not classifier.training
    assert all(parameter.grad is None for parameter in classifier.parameters())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("longest", [2, 3, 4, 5, 16])
def test_short_models_can_be_tried(longest: int, packed: bool) -> None:
    classifier = classifier_of("bert", max_position_embeddings=max(longest, 4))
    assert training_needs(classifier, "sgd", longest, packed=packed).kept.tokens > 0


def test_a_model_that_shows_nothing_is_given_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "kept_bytes", lambda *_, **__: 1000)  # as one that pads every text to its window
    needs = training_needs(classifier_of("bert"), "sgd", 128, packed=False)
    assert needs.kept.tokens == 4 * memory.LEAST * 16 * 2
    assert needs.budget(128)[1] >= needs.kept.tokens


@given(st.lists(st.integers(1, 512), min_size=1, max_size=20))
def test_padding_takes_what_the_longest_takes(lengths: list[int]) -> None:
    padded, packed = (Extent.of(np.asarray(lengths), packed=value) for value in (False, True))
    assert padded == (len(lengths), len(lengths) * max(lengths), len(lengths) * max(lengths) ** 2)
    assert packed[:2] == (len(lengths), sum(lengths))
    assert sum(length**2 for length in lengths) <= packed.pairs <= padded.pairs


@given(st.integers(1, 50), st.integers(1, 512))
def test_a_budget_covers_texts_of_the_longest(count: int, longest: int) -> None:
    needs = MemoryNeeds(1, 2, 3, 4, Extent(50.0, 700.0, 3.0), Extent(5.0, 70.0, 0.3))
    state, per_token = needs.budget(longest)
    assert state == 10
    taken = needs.activations(Extent(count, count * longest, count * longest**2))
    assert taken <= (per_token + 1) * count * longest + 1


def test_predicting_takes_less_than_training() -> None:
    classifier = classifier_of("bert", 0.1)
    state, per_token = prediction_needs(classifier, 128, packed=True)
    training = training_needs(classifier, "adamw_torch", 128, packed=True).budget(128)
    assert state < training[0]
    assert 0 < per_token < training[1]
    assert prediction_needs(classifier, 2**20, packed=True)[1] <= per_token  # nothing is dropped: no pairs


def test_optimizer_state_of_odd_shapes() -> None:
    scalar, cube = torch.nn.Parameter(torch.ones(())), torch.nn.Parameter(torch.ones(2, 3, 5))
    assert optimizer_bytes([scalar, cube], "adamw_torch") == 4 * 2 * 31
    assert optimizer_bytes([scalar, cube], "adafactor") == 4 * (1 + 6 + 10)

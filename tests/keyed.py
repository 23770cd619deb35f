"""Masks by their coordinates, and tiny classifiers in training: what tests of dropout, attention and layouts share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from harness import FAMILIES, SIZES
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from accel_trainer.classifier import Classifier, strays
from accel_trainer.dropout import ForwardPass, Site, drop, example_keys
from accel_trainer.model import DROPOUT_NAMES
from accel_trainer.packing import Packing
from accel_trainer.tokenization import Batch

Mask = npt.NDArray[np.bool_]
MODULE = "bert.encoder.layer.0.output.dropout"


def keys_of(
    rows: Sequence[int], *, seed: int = 42, step: int = 1000, module: str = MODULE, call: int = 0
) -> tuple[Tensor, Tensor]:
    """Keys of examples at a site: that of the module's call number `call` in a forward pass."""
    within = ForwardPass()
    within.begin(example_keys(np.asarray(rows, dtype=np.int64), seed=seed, step=step))
    site = Site(within, module)
    for _ in range(call):
        within.at(site)
    return within.at(site)


def dropped(shape: tuple[int, ...], p: float, rows: Sequence[int] = range(8), **place: Any) -> Mask:
    """Which of the values are dropped: (rows, *shape)."""
    ones = torch.ones(len(rows), *shape)
    return drop(ones, p, keys_of(rows, **place)).numpy() == 0


def words(step: int = 0, rows: Sequence[int] = (3, 1, 4)) -> Tensor:
    return example_keys(np.asarray(rows), seed=42, step=step)


# Families beyond those of the recipes: with attention of their own, and one that looks back only.
MORE: dict[str, dict[str, Any]] = {
    "mpnet": {**SIZES, "max_position_embeddings": 34},
    "deberta-v2": {**SIZES, "max_position_embeddings": 32},
    "roformer": {**SIZES, "max_position_embeddings": 32},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "summary_first_dropout": 0.1},
}
# As published: disentangled attention, whose position embeddings are dropped out of once for the whole micro-batch.
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_position_embeddings": 32}
LENGTHS = (5, 16, 12, 3)
ROWS = (7, 100, 3, 51)


def build(family: str, hidden: float = 0.1, attention: float = 0.1, **more: Any) -> PreTrainedModel:
    """A tiny classifier in float64, with the same weights each time."""
    sizes = {**FAMILIES, **MORE}.get(family, SIZES)
    config = AutoConfig.for_model(family, vocab_size=50, num_labels=3, pad_token_id=0, **{**sizes, **more})
    for field, p in (("hidden_dropout", hidden), ("attention_dropout", attention), ("classifier_dropout", hidden)):
        for name in DROPOUT_NAMES[field]:
            if hasattr(config, name):
                setattr(config, name, p)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return model.double()


def batch(examples: Sequence[int]) -> dict[str, Tensor]:
    """Some of the four examples, padded to the longest of them."""
    generator = np.random.default_rng(0)
    tokens = [generator.integers(5, 50, length).tolist() for length in LENGTHS]
    longest = max(LENGTHS[i] for i in examples)
    padding = {i: [0] * (longest - LENGTHS[i]) for i in examples}
    return {
        "input_ids": torch.tensor([tokens[i] + padding[i] for i in examples]),
        "attention_mask": torch.tensor([[1] * LENGTHS[i] + padding[i] for i in examples]),
    }


def step_of(classifier: Classifier, examples: Sequence[int], **key: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of a micro-batch in training."""
    keys = example_keys(np.asarray([ROWS[i] for i in examples]), **{"seed": 1, "step": 5, **key})
    logits = classifier.train()(batch(examples), keys)
    # Of another weight in each example.
    (logits * torch.tensor([[0.5], [1.0], [-1.0], [2.0]], dtype=logits.dtype)[list(examples)]).square().sum().backward()
    return logits.detach(), gradients(classifier)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and bool(one) and all(torch.equal(one[name], other[name]) for name in one)


def strays_of(classifier: Classifier, inputs: dict[str, Tensor], *, packed: bool = False) -> float:
    """`strays` of padded examples, together or packed into one row, beside each of them alone and without padding."""
    mask = inputs["attention_mask"]
    lengths = mask.sum(1).tolist()
    alone = [
        Batch({name: tokens[i : i + 1, :length] for name, tokens in inputs.items()}, None)
        for i, length in enumerate(lengths)
    ]
    row = {name: tokens[mask == 1].unsqueeze(0) for name, tokens in inputs.items() if name != "attention_mask"}
    return strays(classifier, Batch(row, Packing.of(lengths)) if packed else Batch(inputs, None), alone)

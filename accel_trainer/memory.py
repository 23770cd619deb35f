"""How much memory training takes on each device, told before it runs.

Weights, gradients and the optimizer's state follow from the shapes of the parameters. What a forward pass keeps for the
backward pass is counted on a few tokens of the model itself, in the layout and the precision that will run: it grows with the
examples, with their tokens, and with the pairs of tokens of an example wherever attention keeps its weights.

Legend: b examples; t positions of one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from accel_trainer import dropout
from accel_trainer.classifier import Classifier
from accel_trainer.model import encoder_layers
from accel_trainer.packing import Packing
from accel_trainer.tokenization import Batch

# Measured by benchmarks/memory.py. A process grows beyond what it holds, the more so when activations are computed again, layer
# by layer: probably what is freed between what is kept is too small a gap for the next tensor of its size (glibc 2.36).
SCATTER = 1.8
LAYERS_AGAIN = 3
PROCESS = 45 * 2**20  # bytes of what libraries load and allot when they are first used
PROBE = 4  # tokens of the shortest text that is tried; what is kept of it grows as it does for long ones
LEAST = 8  # vectors for each layer and token; families that pad by themselves show less on a few tokens. Assumption
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
SCALAR = 4  # bytes of a float32


class Extent(NamedTuple):
    """How large a micro-batch is, or what depends on it: an amount for each example, position and pair of positions."""

    examples: float
    tokens: float  # padding included
    pairs: float  # Σ t² over the examples

    @classmethod
    def of(cls, lengths: npt.NDArray[np.int64], *, packed: bool) -> Extent:
        """The extent of texts of these lengths, (b,): padded, all are as long as the longest.

        Packed, attention that drops pads neighbours of like length to the longest of them.
        """
        count, longest = len(lengths), int(lengths.max())
        if not packed:
            return cls(count, count * longest, count * longest**2)
        packing = Packing.of(lengths)
        groups = np.split(lengths, np.cumsum(packing.alike)[:-1])
        return cls(count, int(lengths.sum()), sum(len(group) * int(group.max()) ** 2 for group in groups))

    def times(self, other: Extent) -> float:
        """The amounts of this micro-batch."""
        return sum(amount * count for amount, count in zip(self, other, strict=True))


@dataclass(frozen=True)
class MemoryNeeds:
    """What training takes on each device, in bytes; activations as `Extent` has them."""

    weights: int
    gradients: int
    optimizer: int
    beside: int  # weights in another precision, a gradient before it is added to the others, what libraries allot
    kept: Extent  # until the backward pass
    layer: Extent  # of that, by one layer

    @property
    def state(self) -> int:
        """What does not depend on the micro-batch."""
        return self.weights + self.gradients + self.optimizer + self.beside

    def activations(self, batch: Extent) -> int:
        """What a training step takes for a micro-batch, at its height."""
        scattered = batch._replace(examples=SCATTER * batch.examples, tokens=SCATTER * batch.tokens)
        return round(scattered.times(self.kept))

    def evaluation(self, batch: Extent) -> int:
        """What a forward pass takes for a micro-batch where nothing is kept, nor any attention weight dropped."""
        return round(SCATTER * batch.times(self.layer._replace(pairs=0)))

    def budget(self, longest: int) -> tuple[int, int]:
        """What stays, and what a token takes among texts of so many: for `batching.token_budget`."""
        return self.state, max(1, self.activations(_text(longest)) // longest)


def _text(length: int) -> Extent:
    return Extent(1, length, length**2)


def optimizer_bytes(parameters: Iterable[nn.Parameter], optim: str) -> int:
    """Bytes of an optimizer's state for the parameters that it trains, the counts of steps left out."""

    def numbers(shape: torch.Size) -> int:
        if optim == "adamw_torch":  # two averages
            return 2 * prod(shape)
        if optim == "adafactor":  # an average of each row and of each column
            return prod(shape[:-1]) + prod((*shape[:-2], shape[-1])) if len(shape) > 1 else prod(shape)
        return 0

    return SCALAR * sum(numbers(parameter.shape) for parameter in parameters if parameter.requires_grad)


def kept_bytes(classifier: Classifier, examples: int, length: int, *, packed: bool, mixed_precision: str = "no") -> int:
    """Bytes that a forward pass in training keeps beside the weights, of so many texts of one length."""
    config, device = classifier.model.config, next(classifier.parameters()).device
    token = 1 if config.pad_token_id == 0 else 0
    rows, columns = (1, examples * length) if packed else (examples, length)
    inputs = {"input_ids": torch.full((rows, columns), token)}
    if not packed:  # a mask of nothing would be left out
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][:, length // 2 + 1 :] = 0
    batch = Batch(inputs, Packing.of([length] * examples) if packed else None).on(device)
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*classifier.parameters(), *classifier.buffers()]}
    found: dict[int, int] = {}  # by address: views of one storage keep it once

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    keys = dropout.example_keys(np.arange(examples), seed=0, step=0).to(device)
    precision = torch.autocast(device.type, AUTOCAST.get(mixed_precision), enabled=mixed_precision in AUTOCAST)
    with precision, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = classifier(batch.inputs, keys, batch.packing)
    del logits
    return sum(size for address, size in found.items() if address not in weights)


def kept_activations(
    classifier: Classifier, longest: int, *, packed: bool, mixed_precision: str = "no"
) -> tuple[int, Extent]:
    """What a forward pass in training keeps whatever it computes, and for each example, token and pair of tokens.

    Args:
        classifier: whole, on any device; its mode is left as it was.
        longest: tokens that the model can take, 3 or more.
        packed: the layout.
        mixed_precision: as Accelerate calls it.
    """
    n, was_training = max(1, min(PROBE, longest // 3)), classifier.training
    classifier.train()
    with torch.random.fork_rng(devices=[]):
        one, two, three, both = (
            kept_bytes(classifier, examples, length, packed=packed, mixed_precision=mixed_precision)
            for examples, length in ((1, n), (1, 2 * n), (1, 3 * n), (2, n))
        )
    classifier.train(was_training)
    per_pair = (three - 2 * two + one) / (2 * n * n)
    per_token = (two - one) / n - 3 * n * per_pair
    per_example = both - one - n * per_token - n * n * per_pair
    return round(one - per_example - n * per_token - n * n * per_pair), Extent(per_example, per_token, per_pair)


@contextmanager
def _without_checkpointing(classifier: Classifier) -> Iterator[bool]:
    """Let a model keep all of its activations; whether it otherwise would not."""
    layers = [module for module in classifier.modules() if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield bool(layers)
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True  # type: ignore[assignment]


def training_needs(
    classifier: Classifier,
    optim: str,
    longest: int,
    *,
    packed: bool,
    num_processes: int = 1,
    mixed_precision: str = "no",
    sharded: bool = False,
) -> MemoryNeeds:
    """What training a classifier takes on each device.

    Args:
        classifier: whole, on any device, with gradient checkpointing as it will be trained.
        optim: the optimizer, as `training.optim` has it.
        longest: tokens of the longest text that the model can take.
        packed: the layout.
        num_processes: of several, each holds the gradients twice: DDP's buckets.
        mixed_precision: as Accelerate calls it.
        sharded: each process holds its share of weights, gradients and optimizer, and some weights whole for a while.
    """
    config = classifier.model.config
    layers, width = getattr(config, "num_hidden_layers", 12), getattr(config, "hidden_size", 768)
    with _without_checkpointing(classifier) as checkpointed:
        fixed, kept = kept_activations(classifier, longest, packed=packed, mixed_precision=mixed_precision)
    kept = kept._replace(tokens=max(kept.tokens, SCALAR * LEAST * width * layers))
    layer = Extent(*(amount / layers for amount in kept))
    if checkpointed:
        fixed, inputs = kept_activations(classifier, longest, packed=packed, mixed_precision=mixed_precision)
        kept = Extent(*(a + LAYERS_AGAIN * b for a, b in zip(inputs, layer, strict=True)))
    trainable = [p.numel() for p in classifier.parameters() if p.requires_grad]
    weights, optimizer = (
        SCALAR * sum(p.numel() for p in classifier.parameters()),
        optimizer_bytes(classifier.parameters(), optim),
    )
    if sharded:
        together = SCALAR * whole_at_once(classifier)
        return MemoryNeeds(
            weights=weights // num_processes + together,
            gradients=SCALAR * sum(trainable) // num_processes,
            optimizer=optimizer // num_processes,
            beside=together
            + PROCESS,  # their gradients, on the way to those who hold them; no other copy of weights is kept
            kept=kept,
            layer=layer,
        )
    return MemoryNeeds(
        weights=weights,
        gradients=SCALAR * sum(trainable) * (1 if num_processes == 1 else 2),
        optimizer=optimizer,
        beside=fixed + SCALAR * max(trainable, default=0) + PROCESS,
        kept=kept,
        layer=layer,
    )


def whole_at_once(classifier: Classifier) -> int:
    """How many weights a process that holds shares has whole at once: those of no layer, a layer's and the next one's."""
    layers = [sum(p.numel() for p in layer.parameters()) for layer in encoder_layers(classifier.model) or ()]
    return sum(p.numel() for p in classifier.parameters()) - sum(layers) + sum(sorted(layers)[-2:])


def prediction_needs(classifier: Classifier, longest: int, *, packed: bool) -> tuple[int, int]:
    """What a classifier that only predicts takes: the weights, and a token among texts of so many.

    Its tensors are those of one layer, which the next layer overwrites.
    """
    needs = training_needs(classifier, "sgd", longest, packed=packed)
    return needs.weights + PROCESS, max(1, needs.evaluation(_text(longest)) // longest)

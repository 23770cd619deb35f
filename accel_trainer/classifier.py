"""The module that is trained, and that Accelerate prepares: a stock classifier of transformers, padded or packed.

Legend: b examples, t tokens of the longest of them padded, of all of them packed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from accel_trainer import attention, dropout, last_layer
from accel_trainer.dropout import ForwardPass
from accel_trainer.model import is_stock_encoder
from accel_trainer.packing import Packing
from accel_trainer.tokenization import OFFSET_POSITIONS, Batch

# Families whose logits and gradients are held to be the same packed as padded, by tests/test_packed_families.py. Others are
# tried on a few rows before they are trained.
PACKED = frozenset({"albert", "bert", "distilbert", "electra", "modernbert", "roberta", "xlm-roberta"})


class Classifier(nn.Module):
    """Logits of a micro-batch."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.forward_pass = ForwardPass()
        dropout.install(model, self.forward_pass)
        self.can_pack = attention.install(model) and last_layer.install(model, self.forward_pass)
        if self.can_pack:
            model.base_model.forward = BaseModel(model.base_model, self.forward_pass)

    @property
    def is_known(self) -> bool:
        """Whether the model is one of transformers' own, of a family that is held to be the same packed as padded."""
        # Chunks of a row are not those of its examples, and each is a call of its dropout.
        chunked = getattr(self.model.config, "chunk_size_feed_forward", 0)
        family = self.model.config.model_type
        return self.can_pack and is_stock_encoder(self.model) and family in PACKED and not chunked

    def forward(
        self, inputs: dict[str, Tensor], example_keys: Tensor | None = None, packing: Packing | None = None
    ) -> Tensor:
        """Logits of each example, independent of what stands beside it but for rounding (`strays` measures that).

        Args:
            inputs: `input_ids`, `attention_mask`, …, each (b, t), padded on the right; packed (1, t), without a mask.
            example_keys: `dropout.example_keys` of the examples, (b, 4); needed in training.
            packing: where the examples stand in the one row; None: padded.

        Returns:
            shape (b, num_labels).
        """
        self.forward_pass.begin(example_keys, packing)
        if packing is not None:
            position_ids = _position_ids(self.model, inputs["input_ids"], packing)
            inputs = {**inputs, "position_ids": position_ids, "attention_mask": packing.mask}
        logits: Tensor = self.model(**inputs).logits
        self.forward_pass.end(backward_follows=torch.is_grad_enabled())
        return logits


class BaseModel:
    """What replaces the `forward` of a base model: packed, the padding mask is for the head alone."""

    def __init__(self, base: nn.Module, within: ForwardPass) -> None:
        self.base, self.within = base, within

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The stock model's `forward`."""
        if self.within.packing is not None:
            named["attention_mask"] = None
        return type(self.base).forward(self.base, *arguments, **named)


def _position_ids(model: PreTrainedModel, input_ids: Tensor, packing: Packing) -> Tensor:
    """The numbers of the places in each example, (1, t), as the family counts them when padded."""
    if model.config.model_type not in OFFSET_POSITIONS:
        return packing.positions.long().unsqueeze(0)
    # RoBERTa's count from one past the padding id, and give a padding token, which a text may spell out, that id itself.
    pad = model.config.pad_token_id
    real: Tensor = input_ids[0] != pad
    counts = real.cumsum(0)
    before = (counts - real.long()).index_select(0, packing.starts)
    position_ids: Tensor = (counts - before[packing.examples]) * real + pad
    return position_ids.unsqueeze(0)


def strays(classifier: Classifier, together: Batch, alone: Sequence[Batch]) -> float:
    """How far logits in training depend on anything but their example: padding, neighbours, layout, torch's random stream.

    Learns on the way, where `together` is padded, which dropouts are of something that the examples share, such as a table of
    positions; a model that has such a thing does not pack.

    Args:
        classifier: on the CPU, before it is prepared; its mode is left as it was.
        together: two examples at least, best of different lengths, as they would be trained.
        alone: each of them by itself, padded.

    Returns:
        largest difference of a logit, computed together with the others and alone, relative to the largest logit;
        infinite if torch's random stream makes any difference, or if only together they are no numbers; 0 if alone they are
        none either.
    """
    keys = dropout.example_keys(np.arange(len(alone)), seed=0, step=0)
    was_training = classifier.training
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        if together.packing is None:
            classifier.eval()
            one = Batch({name: tensor[:1] for name, tensor in together.inputs.items()}, None)
            of_all, of_one = _sizes(classifier, together), _sizes(classifier, one)
            shared = frozenset(site for site, size in of_all.items() if of_one.get(site) == size)
            classifier.forward_pass.shared = shared
        classifier.train()
        torch.manual_seed(0)
        first = classifier(together.inputs, keys, together.packing)
        torch.manual_seed(1)
        again = classifier(together.inputs, keys, together.packing)
        singly = torch.cat([classifier(one.inputs, keys[i : i + 1]) for i, one in enumerate(alone)])
    classifier.train(was_training)
    if not singly.isfinite().all():
        return 0.0
    if not first.isfinite().all():
        return math.inf
    return float((first - singly).abs().max() / first.abs().max()) if torch.equal(first, again) else math.inf


def _sizes(classifier: Classifier, batch: Batch) -> dict[str, int]:
    """Length of the first axis of what each dropout is given, by the name of its module."""
    sizes: dict[str, int] = {}

    def note(module: nn.Module, arguments: tuple[Tensor]) -> None:
        assert isinstance(module, dropout.KeyedDropout)
        sizes[module.site.module] = len(arguments[0])

    dropouts = [module for module in classifier.modules() if isinstance(module, dropout.KeyedDropout)]
    hooks = [module.register_forward_pre_hook(note) for module in dropouts]
    classifier(batch.inputs, packing=batch.packing)
    for hook in hooks:
        hook.remove()
    return sizes

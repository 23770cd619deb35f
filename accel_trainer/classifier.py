"""The module that is trained, and that Accelerate prepares: a stock classifier of transformers with its dropout keyed."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from accel_trainer import dropout


class Classifier(nn.Module):
    """Logits of a micro-batch. Legend: b examples, t tokens of the longest of them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.dropout_keys = dropout.install(model)
        self._no_split_modules = model._no_split_modules  # where Accelerate looks for the layers that FSDP shards

    def forward(self, inputs: dict[str, Tensor], example_keys: Tensor | None = None) -> Tensor:
        """Logits of each example, independent of what stands beside it but for rounding (`strays` measures that).

        Args:
            inputs: `input_ids`, `attention_mask`, …, each (b, t), padded on the right.
            example_keys: `dropout.example_keys` of the examples, (b, 4); needed in training.

        Returns:
            shape (b, num_labels).
        """
        self.dropout_keys.begin(example_keys)
        logits: Tensor = self.model(**inputs).logits
        self.dropout_keys.end()
        return logits


def strays(classifier: Classifier, inputs: dict[str, Tensor]) -> float:
    """How far logits in training depend on anything but their example: padding, neighbours, torch's random stream.

    Learns on the way which dropouts are of something that the examples share, such as a table of positions.

    Args:
        classifier: on the CPU, before it is prepared; its mode is left as it was.
        inputs: of two examples at least, best of different lengths.

    Returns:
        largest difference of a logit, computed together with the others and alone, relative to the largest logit;
        infinite if torch's random stream makes any difference; 0 if the logits are not numbers.
    """
    b = len(inputs["input_ids"])
    lengths = inputs["attention_mask"].sum(-1).tolist()
    keys = dropout.example_keys(np.arange(b), seed=0, step=0)
    was_training = classifier.training
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        classifier.eval()
        of_all, of_one = _sizes(classifier, inputs), _sizes(classifier, {k: v[:1] for k, v in inputs.items()})
        classifier.dropout_keys.shared = frozenset(site for site, size in of_all.items() if of_one.get(site) == size)
        classifier.train()
        torch.manual_seed(0)
        together = classifier(inputs, keys)
        torch.manual_seed(1)
        again = classifier(inputs, keys)
        own = [{name: value[i : i + 1, : lengths[i]] for name, value in inputs.items()} for i in range(b)]
        alone = torch.cat([classifier(own[i], keys[i : i + 1]) for i in range(b)])
    classifier.train(was_training)
    if not together.isfinite().all():
        return 0.0
    return float((together - alone).abs().max() / together.abs().max()) if torch.equal(together, again) else math.inf


def _sizes(classifier: Classifier, inputs: dict[str, Tensor]) -> dict[str, int]:
    """Length of the first axis of what each dropout is given, by the name of its module."""
    sizes: dict[str, int] = {}

    def note(module: nn.Module, arguments: tuple[Tensor]) -> None:
        assert isinstance(module, dropout.KeyedDropout)
        sizes[module.site.module] = len(arguments[0])

    dropouts = [module for module in classifier.modules() if isinstance(module, dropout.KeyedDropout)]
    hooks = [module.register_forward_pre_hook(note) for module in dropouts]
    classifier(inputs)
    for hook in hooks:
        hook.remove()
    return sizes

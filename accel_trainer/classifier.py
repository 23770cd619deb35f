"""The module that is trained, and that Accelerate prepares: a stock classifier of transformers with its dropout keyed."""

from __future__ import annotations

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

    def forward(self, inputs: dict[str, Tensor], example_keys: Tensor | None = None) -> Tensor:
        """Logits of each example, independent of what stands beside it but for rounding.

        Args:
            inputs: `input_ids`, `attention_mask`, …, each (b, t), padded on the right.
            example_keys: `dropout.example_keys` of the examples, (b, 2); needed in training.

        Returns:
            shape (b, num_labels).
        """
        self.dropout_keys.begin(example_keys)
        logits: Tensor = self.model(**inputs).logits
        self.dropout_keys.end()
        return logits


def draws_of_its_own(classifier: Classifier, inputs: dict[str, Tensor]) -> bool:
    """Whether training depends on torch's random stream as well, as with functional dropout or layers left out.

    Args:
        classifier: on the CPU, before it is prepared; its mode is left as it was.
        inputs: of an example or a few.
    """
    was_training = classifier.training
    keys = dropout.example_keys(torch.arange(len(inputs["input_ids"])).numpy(), seed=0, step=0)
    logits = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        classifier.train()
        for seed in (1, 2):
            torch.manual_seed(seed)
            logits.append(classifier(inputs, keys))
    classifier.train(was_training)
    return not torch.equal(*logits)

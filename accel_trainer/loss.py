"""The loss: a sum over examples, divided by the size of the global batch in one place (`train.add_gradients`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def example_losses(logits: Tensor, labels: Tensor, label_smoothing_factor: float = 0.0) -> Tensor:
    """Cross-entropy of each example.

    With smoothing factor ε the target is (1 - ε) on the label and ε spread evenly over all classes, the label included
    (Szegedy et al., "Rethinking the Inception architecture", CVPR 2016), as `torch.nn.CrossEntropyLoss` has it.

    Args:
        logits: (examples, num_labels), any floating type; computed in float32 at least.
        labels: (examples,), class ids.
        label_smoothing_factor: ε in [0, 1).

    Returns:
        shape (examples,), not reduced.
    """
    precise = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(precise, labels, reduction="none", label_smoothing=label_smoothing_factor)

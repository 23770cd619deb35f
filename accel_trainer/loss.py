"""The loss: a sum over examples, divided by the size of the global batch in one place (`train.add_gradients`); its tally."""

from __future__ import annotations

import torch
from accelerate import Accelerator
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


class Tally:
    """The losses of the steps since they were last read, kept on the device, so that no step waits for it."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        # Wide where the device is, so that it does not matter there when they were last read.
        wide = torch.float32 if accelerator.device.type in ("mps", "xla") else torch.float64
        self._nothing = torch.tensor([0.0, torch.inf], dtype=wide, device=accelerator.device)
        self._tally = self._nothing  # sum of losses; first step that is not finite

    def add(self, step: int, loss_sum: Tensor, grad_norm: Tensor) -> None:
        """Add this process's share of a step.

        Args:
            step: counted from 1.
            loss_sum: scalar, plain sum of example losses.
            grad_norm: scalar.
        """
        total, first = self._tally
        finite = torch.isfinite(loss_sum) & torch.isfinite(grad_norm)
        self._tally = torch.stack([total + loss_sum, torch.where(finite, first, first.clamp(max=step))])

    def read(self) -> tuple[float, int | None]:
        """Sum over all processes since it was last read, and the first step whose loss or gradient was no number.

        The same on every process. Collective; waits for the device.
        """
        everyone = self._accelerator.gather(self._tally[None]).cpu()
        self._tally = self._nothing
        first = float(everyone[:, 1].min())
        return float(everyone[:, 0].sum()), None if first == torch.inf else int(first)

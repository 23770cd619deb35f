"""The loss of each example is cross-entropy as torch has it, unreduced and precise."""

import pytest
import torch
from torch.nn import functional

from accel_trainer.loss import example_losses


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(7, 5, generator=generator) * 3, torch.randint(0, 5, (7,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_sum_is_torch_cross_entropy(batch: tuple[torch.Tensor, torch.Tensor], smoothing: float) -> None:
    logits, labels = batch
    losses = example_losses(logits, labels, smoothing)
    assert losses.shape == (7,)
    expected = functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(losses.sum(), expected)


def test_smoothing_by_its_definition(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    epsilon, classes = 0.2, logits.shape[1]
    target = torch.full_like(logits, epsilon / classes)
    target[torch.arange(len(labels)), labels] += 1 - epsilon
    torch.testing.assert_close(
        example_losses(logits, labels, epsilon), -(target * logits.log_softmax(dim=-1)).sum(dim=-1)
    )
    assert not torch.allclose(example_losses(logits, labels, epsilon), example_losses(logits, labels))


def test_an_example_does_not_know_its_neighbours(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    together = example_losses(logits, labels, 0.1)
    apart = torch.cat([example_losses(logits[i : i + 1], labels[i : i + 1], 0.1) for i in range(len(labels))])
    torch.testing.assert_close(together, apart)


def test_float64_stays_and_halves_are_raised(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    precise = example_losses(logits.double(), labels)
    assert precise.dtype == torch.float64
    exact = logits.double().logsumexp(-1) - logits.double().gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(precise, exact, rtol=1e-13, atol=1e-13)
    for low in (torch.float16, torch.bfloat16):
        losses = example_losses(logits.to(low), labels)
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, example_losses(logits.to(low).float(), labels), rtol=0, atol=0)


def test_gradient_is_probabilities_minus_target(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    logits = logits.clone().requires_grad_()
    example_losses(logits, labels).sum().backward()
    expected = logits.detach().softmax(-1) - functional.one_hot(labels, 5)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected)

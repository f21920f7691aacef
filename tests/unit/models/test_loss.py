"""The loss equals its definition."""

import math

import torch

from switchtitan.contracts import IGNORED_TARGET
from switchtitan.models.loss import summed_cross_entropy

VOCABULARY = 13


def draw(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(3, 7, VOCABULARY, generator=generator)).to(dtype)
    return logits, torch.randint(VOCABULARY, (3, 7), generator=generator)


def by_hand(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """The sum of -log softmax at each target, number by number in float64."""
    total = 0.0
    for row, target in zip(logits.flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True):
        if target != IGNORED_TARGET:
            total += math.log(math.fsum(map(math.exp, row))) - row[target]
    return total


def test_loss_is_the_sum_of_negative_log_probabilities_in_fp32():
    for dtype in (torch.float32, torch.bfloat16):
        logits, targets = draw(dtype)
        loss = summed_cross_entropy(logits, targets)
        assert loss.dtype == torch.float32
        # fp32 rounds 21 terms of order 10 by 6e-8 each; bfloat16 would by 4e-3.
        assert abs(loss.item() / by_hand(logits, targets) - 1) < 1e-6


def test_ignored_targets_have_no_loss_and_no_gradient():
    logits, targets = draw(torch.float32)
    logits.requires_grad_()
    targets[0, 2] = targets[2] = IGNORED_TARGET
    loss = summed_cross_entropy(logits, targets)
    loss.backward()
    assert abs(loss.item() / by_hand(logits, targets) - 1) < 1e-6
    ignored = targets == IGNORED_TARGET
    assert not logits.grad[ignored].any()
    assert logits.grad[~ignored].any(dim=-1).all()
    assert summed_cross_entropy(logits[2:], targets[2:]).item() == 0.0

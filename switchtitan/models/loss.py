"""The training loss, from hidden states and the head, without all logits in memory at once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switchtitan.contracts import IGNORED_TARGET
from switchtitan.models.chunked_loss import (
    ChunkLoss,
    ChunkLossAndGradient,
    chunk_loss_,
    chunk_loss_and_gradient_,
    chunked_cross_entropy,
)


class CrossEntropy:
    """Computes the sum over targets of -log p(target), in nats, in fp32 or wider.

    For a plain linear head without a bias, logits and their gradients exist for one chunk of tokens
    at a time. Any other head, such as a low-rank one, computes all logits.

    Args:
        compile_regions: compile everything but matrix products and the head, for static shapes.
    """

    def __init__(self, compile_regions: bool) -> None:
        fuse: Callable[[Callable[..., Any]], Callable[..., Any]] = (
            partial(torch.compile, fullgraph=True, dynamic=False) if compile_regions else _as_is
        )
        self._logits_loss: Callable[[Tensor, Tensor], Tensor] = fuse(summed_cross_entropy)
        self._chunk_loss: ChunkLoss = fuse(chunk_loss_)
        self._chunk_loss_and_gradient: ChunkLossAndGradient = fuse(chunk_loss_and_gradient_)

    def __call__(
        self, hidden: Tensor, head: nn.Module, targets: Tensor, divisor: int = 1
    ) -> Tensor:
        """Returns the sum divided by `divisor`, 0-dim.

        Args:
            hidden: [batch, seq, dim].
            head: [..., dim] -> logits [..., vocabulary].
            targets: [batch, seq]; `IGNORED_TARGET` is ignored.
            divisor: dividing here rather than afterwards avoids rounding the gradient twice.
        """
        if type(head) is not nn.Linear or head.bias is not None:
            return self._logits_loss(head(hidden), targets) / divisor
        return chunked_cross_entropy(
            hidden.flatten(0, 1),
            head.weight,
            targets.flatten(),
            divisor,
            loss_fn=self._chunk_loss,
            loss_and_gradient_fn=self._chunk_loss_and_gradient,
        )


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the sum over targets of -log p(target), in nats, computed in fp32; 0-dim.

    Args:
        logits: [batch, seq, vocabulary].
        targets: [batch, seq]; `IGNORED_TARGET` is ignored.
    """
    return F.cross_entropy(
        logits.flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=IGNORED_TARGET,
        reduction="sum",
    )


def _as_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function

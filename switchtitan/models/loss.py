"""The training loss, from hidden states and the head, without the logits of all tokens at a time."""

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
    chunked_cross_entropy,
    loss_and_gradient_of_chunk_,
    loss_of_chunk_,
)


class CrossEntropy:
    """Computes the sum over all targets of -log p(target), in nats, at least in fp32.

    Where the head is a plain linear layer without a bias, logits and their gradients are there for a chunk of tokens at a
    time. Any other head, such as an adapted one, computes all logits, in its own way.

    Args:
        compile_regions: whether what is neither a matrix product nor the head is compiled, for fixed shapes.
    """

    def __init__(self, compile_regions: bool) -> None:
        fuse: Callable[[Callable[..., Any]], Callable[..., Any]] = (
            partial(torch.compile, fullgraph=True, dynamic=False) if compile_regions else _as_is
        )
        self._of_logits: Callable[[Tensor, Tensor], Tensor] = fuse(summed_cross_entropy)
        self._of_chunk: ChunkLoss = fuse(loss_of_chunk_)
        self._of_chunk_with_gradient: ChunkLossAndGradient = fuse(loss_and_gradient_of_chunk_)

    def __call__(
        self, hidden: Tensor, head: nn.Module, targets: Tensor, divisor: int = 1
    ) -> Tensor:
        """The sum divided by `divisor`, 0-dim.

        Args:
            hidden: [batch, seq, dim].
            head: [..., dim] -> logits [..., vocabulary].
            targets: [batch, seq]; `IGNORED_TARGET` does not count.
            divisor: given here rather than divided by afterwards, it costs the gradient no second rounding.
        """
        if type(head) is not nn.Linear or head.bias is not None:
            return self._of_logits(head(hidden), targets) / divisor
        return chunked_cross_entropy(
            hidden.flatten(0, 1),
            head.weight,
            targets.flatten(),
            divisor,
            of_chunk_=self._of_chunk,
            of_chunk_with_gradient_=self._of_chunk_with_gradient,
        )


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum over all targets of -log p(target), in nats, computed in fp32; 0-dim.

    Args:
        logits: [batch, seq, vocabulary].
        targets: [batch, seq]; `IGNORED_TARGET` does not count.
    """
    return F.cross_entropy(
        logits.flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=IGNORED_TARGET,
        reduction="sum",
    )


def _as_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function

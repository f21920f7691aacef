"""The output head, whose loss is computed in chunks."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Linear):
    """Hidden states [..., dim] -> logits [..., vocabulary], without a bias.

    A loss that does not need all logits at once passes a function of hidden states and weight. It
    runs inside the call, because FSDP gathers and frees a module's weight, and reduces its
    gradient, in hooks of the call.
    """

    def __init__(self, dim: int, vocabulary: int) -> None:
        super().__init__(dim, vocabulary, bias=False)

    def forward(
        self, hidden: Tensor, function: Callable[[Tensor, Tensor], Tensor] = F.linear
    ) -> Tensor:
        return function(hidden, self.weight)

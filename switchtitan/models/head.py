"""The output head, whose loss is computed in chunks."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Linear):
    """Hidden states [..., dim] -> logits [..., vocabulary], without a bias.

    A loss in chunks passes a function of hidden states and weight. It runs inside the call, because
    FSDP gathers and frees the weight, and reduces its gradient, in hooks of the call.
    """

    def __init__(self, dim: int, vocabulary: int) -> None:
        super().__init__(dim, vocabulary, bias=False)

    def forward(
        self, hidden: Tensor, function: Callable[[Tensor, Tensor], Tensor] = F.linear
    ) -> Tensor:
        return function(hidden, self.weight)


class TiedHead(nn.Module):
    """A head that multiplies by the embedding's weight, and has no parameter of its own.

    A model with this head leaves the embedding out of `outer_units`, since its weight must stay
    gathered until the head has run.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        # In a tuple: as a submodule, the weight would have a second name.
        self._embedding = (embedding,)

    def forward(
        self, hidden: Tensor, function: Callable[[Tensor, Tensor], Tensor] = F.linear
    ) -> Tensor:
        return function(hidden, self._embedding[0].weight)

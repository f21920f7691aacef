"""Choose the next token from a model's logits."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token."""

    temperature: float = 1.0
    """Divides the logits; 0 always chooses the most probable token."""
    top_k: int | None = None
    """Only the `top_k` most probable tokens, and those as probable as the last of them."""
    top_p: float | None = None
    """Only the fewest most probable tokens whose probabilities add up to `top_p` or more."""


class Sampler:
    """Draws tokens; the same logits in the same order give the same tokens.

    Args:
        seed: of the random numbers, at least 0. Without effect at temperature 0.
    """

    def __init__(self, sampling: Sampling, seed: int = 0) -> None:
        self._sampling = sampling
        # Not the global generator, whose state belongs to training.
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> list[int]:
        """Returns one token for each row of `logits` [batch, vocabulary], on any device."""
        if self._sampling.temperature == 0:
            greedy: list[int] = logits.argmax(dim=-1).tolist()
            return greedy
        # Drawn on the CPU, so that a seed means the same on every device.
        chances = probabilities(logits.float().cpu(), self._sampling)
        drawn: list[int] = torch.multinomial(chances, 1, generator=self._generator)[:, 0].tolist()
        return drawn


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Returns the probabilities [batch, vocabulary] that a `Sampler` draws with.

    Args:
        logits: [batch, vocabulary], fp32 or wider.
        sampling: its temperature is above 0.
    """
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        last_kept = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < last_kept, -torch.inf)
    if sampling.top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        chances = ordered.softmax(dim=-1)
        # A token stays if those before it do not suffice. So the first one always stays.
        is_dropped = chances.cumsum(dim=-1) - chances >= sampling.top_p
        is_dropped[:, 0] = False
        logits = logits.masked_fill(
            torch.zeros_like(is_dropped).scatter_(-1, order, is_dropped), -torch.inf
        )
    return logits.softmax(dim=-1)

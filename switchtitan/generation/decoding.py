"""Continue a sequence with a model: draw the next token from its logits, one at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switchtitan.contracts import LanguageModel


def continuation(
    model: LanguageModel,
    prompt: Sequence[int],
    choose: Callable[[Tensor], int],
    num_tokens: int,
    device: torch.device,
) -> Iterator[int]:
    """Yields the next token of a sequence, `num_tokens` times.

    Args:
        model: for passes without gradients, on `device`; see `TrainedModel.load`.
        prompt: its tokens, at least one.
        choose: logits [vocabulary] -> the next token, e.g. a `Sampler`.
    """
    cache = model.new_cache(len(prompt) + num_tokens, device)
    cached = {} if cache is None else {"cache": cache}
    sequence = unread = list(prompt)
    for _ in range(num_tokens):
        tokens = torch.tensor([unread], device=device)
        document_ids = torch.zeros_like(tokens, dtype=torch.int32)
        token = choose(model(tokens, document_ids, lambda x, head: head(x[:, -1])[0], **cached))
        yield token
        sequence.append(token)
        unread = sequence if cache is None else [token]


@dataclass
class Sampler:
    """Chooses tokens; the same logits in the same order give the same tokens."""

    temperature: float = 1.0
    """Divides the logits; 0 always chooses the most probable token."""
    top_k: int | None = None
    """Only the `top_k` most probable tokens, and those as probable as the last of them."""
    top_p: float | None = None
    """Only the fewest most probable tokens whose probabilities add up to `top_p` or more."""
    seed: int = 0
    """Of the random numbers, at least 0. Without effect at temperature 0."""

    def __post_init__(self) -> None:
        # Not the global generator, whose state belongs to training.
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, logits: Tensor) -> int:
        """Returns a token for `logits` [vocabulary], on any device."""
        if self.temperature == 0:
            return int(logits.argmax())
        # Drawn on the CPU, so that a seed means the same on every device.
        chances = self.probabilities(logits.float().cpu())
        return int(torch.multinomial(chances, 1, generator=self._generator))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Returns the probabilities of tokens [vocabulary] at a temperature above 0, of logits
        [vocabulary] in fp32 or wider."""
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < len(logits):
            last_kept = logits.topk(self.top_k).values[-1]
            logits = logits.masked_fill(logits < last_kept, -torch.inf)
        if self.top_p is not None:
            ordered, order = logits.sort(descending=True, stable=True)
            chances = ordered.softmax(dim=-1)
            # A token stays if those before it do not suffice. So the first one always stays.
            is_dropped = chances.cumsum(dim=-1) - chances >= self.top_p
            is_dropped[0] = False
            logits[order[is_dropped]] = -torch.inf
        return logits.softmax(dim=-1)

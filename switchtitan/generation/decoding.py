"""Continue sequences of tokens with a model, one token at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from switchtitan.contracts import Cache, LanguageModel
from switchtitan.distributed.fsdp import free_gathered_weights

Choose = Callable[[Tensor], list[int]]
"""Logits [batch, vocabulary] -> the next token of each row."""


def continuations(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    choose: Choose,
    num_tokens: int,
    device: torch.device,
) -> Iterator[list[int]]:
    """Yields the next token of every prompt, `num_tokens` times.

    All prompts are read in one pass. If the model is sharded, all ranks must iterate, to the end or
    equally far. Compiles nothing, and leaves the model as it was.

    Args:
        prompts: tokens, at least one in each prompt.
        choose: the same on all ranks, e.g. a `Sampler`.
        device: where the model computes.
    """
    sequences = [list(prompt) for prompt in prompts]
    capacity = max(map(len, prompts)) + num_tokens
    cache = model.new_cache(len(prompts), capacity, device)
    unread = sequences
    try:
        for _ in range(num_tokens):
            with _inference(model):
                logits = _next_logits(model, unread, cache, device)
            chosen = choose(logits)
            yield chosen
            sequences = [[*row, token] for row, token in zip(sequences, chosen, strict=True)]
            unread = sequences if cache is None else [[token] for token in chosen]
    finally:
        free_gathered_weights(model)


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        # Compiled blocks have static shapes: each length of a sequence would compile them again.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)


def _next_logits(
    model: LanguageModel, unread: list[list[int]], cache: Cache | None, device: torch.device
) -> Tensor:
    """Reads tokens of each sequence; returns the logits [batch, vocabulary] after their last."""
    tokens, lengths = _padded(unread, device)
    rows = torch.arange(len(unread), device=device)

    def logits_at_ends(hidden: Tensor, head: nn.Module) -> Tensor:
        logits: Tensor = head(hidden[rows, lengths - 1])
        return logits

    document_ids = torch.zeros_like(tokens, dtype=torch.int32)
    cached = {} if cache is None else {"cache": cache}
    logits: Tensor = model(tokens, document_ids, logits_at_ends, **cached)
    if cache is not None:
        cache.advance(lengths)
    return logits


def _padded(sequences: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns tokens [batch, longest], padded on the right, and the lengths [batch], int64."""
    longest = max(map(len, sequences))
    rows = [sequence + [0] * (longest - len(sequence)) for sequence in sequences]
    lengths = [len(sequence) for sequence in sequences]
    return torch.tensor(rows, device=device), torch.tensor(lengths, device=device)

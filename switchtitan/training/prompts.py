"""Continues a few texts with the model in training, to show what it has learned."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from switchtitan.contracts import LanguageModel
from switchtitan.data.tokenizer import DocumentTokenizer
from switchtitan.errors import ConfigError
from switchtitan.generation.decoding import continuations
from switchtitan.generation.sampling import Sampler, Sampling
from switchtitan.generation.text import TextStream, prompt_ids


class Continuation(NamedTuple):
    """A prompt, and the text after it."""

    prompt: str
    text: str


class Prompts:
    """Texts that a model continues with the most probable tokens.

    Args:
        documents: the tokenizer of the model's corpus.
        num_tokens: of each continuation, at most.
        seq_len: of training, which prompt and continuation must not exceed.
        device: where the model computes.

    Raises:
        ConfigError: if a prompt is too long.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        documents: DocumentTokenizer,
        *,
        num_tokens: int,
        seq_len: int,
        device: torch.device,
    ) -> None:
        self._prompts = prompts
        self._documents = documents
        self._num_tokens = num_tokens
        self._device = device
        # An empty prompt begins a document.
        self._tokens = [
            prompt_ids(documents.tokenizer, prompt) or [documents.eos_id] for prompt in prompts
        ]
        for index, tokens in enumerate(self._tokens):
            if len(tokens) + num_tokens > seq_len:
                raise ConfigError(
                    f"[evaluation] prompts[{index}]: its {len(tokens)} tokens and prompt_tokens = "
                    f"{num_tokens} exceed [data] seq_len = {seq_len}; shorten it, or lower "
                    "prompt_tokens"
                )

    def __call__(self, model: LanguageModel) -> list[Continuation]:
        """Returns a continuation of each prompt, up to the end of its document.

        All ranks must call; they gather a sharded model's weights once for each token, and compute
        the same. Draws no random numbers.
        """
        greedy = Sampler(Sampling(temperature=0))
        # Never ends early: the ranks' passes must be equally many, whatever they compute.
        steps = list(continuations(model, self._tokens, greedy, self._num_tokens, self._device))
        return [
            Continuation(prompt, self._text(tokens, new))
            for prompt, tokens, new in zip(
                self._prompts, self._tokens, zip(*steps, strict=True), strict=True
            )
        ]

    def _text(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        stream = TextStream(self._documents.tokenizer, prompt)
        pieces = []
        for token in new:
            if token == self._documents.eos_id:
                break
            pieces.append(stream.add(token))
        return "".join(pieces) + stream.rest()

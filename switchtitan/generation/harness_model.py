"""A trained model as the lm-evaluation-harness calls it. Needs the package lm-eval."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from switchtitan.contracts import LanguageModel
from switchtitan.data.tokenizer import DocumentTokenizer
from switchtitan.generation.decoding import continuations
from switchtitan.generation.sampling import Sampler, Sampling
from switchtitan.generation.text import TextStream, prefix_ids, prompt_ids

DEFAULT_NEW_TOKENS = 256
"""Tokens of an answer, if a task gives no number; as in the harness's own models."""


class HarnessModel(TemplateLM):
    """Scores and continues texts for the tasks of the harness.

    Args:
        documents: the model's tokenizer.
        stops: tokens that end a text.
        max_length: tokens of the longest sequence; longer ones lose their start.
        batch_size: sequences in one pass.
    """

    def __init__(
        self,
        model: LanguageModel,
        documents: DocumentTokenizer,
        *,
        stops: frozenset[int],
        max_length: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._model = model
        self._documents = documents
        self._tokenizer = documents.tokenizer
        self._stops = stops
        self._max_length = max_length
        self._batch_size = batch_size
        self._device = device
        self._samplers: dict[Sampling, Sampler] = {}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._documents.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        return (prefix_ids(self._tokenizer) or [self.eot_token_id])[-1]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        """Returns the tokens of a text, after what the tokenizer puts before texts."""
        ids = prompt_ids(self._tokenizer, string)
        return ids[len(prefix_ids(self._tokenizer)) :] if add_special_tokens is False else ids

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-likelihood of each text, in windows with as much context as fits."""
        windows: list[tuple[list[int], list[int]]] = []
        counts = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            own = list(get_rolling_token_windows(tokens, self.prefix_token_id, self._max_length, 1))
            windows += [(inputs, predicted) for inputs, predicted in own]
            counts.append(len(own))
        scores = iter(self._score(windows, disable_tqdm))
        return [sum(score for score, _ in islice(scores, count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the continuation of each text, up to a string in `until`.

        Texts are drawn with one generator for all calls: a repeated request gets another text, and
        the same calls of another `HarnessModel` the same ones."""
        texts = [""] * len(requests)
        prompts = [self._prompt(*request.args) for request in requests]
        groups: dict[tuple[Sampling, int], list[int]] = {}
        for index, prompt in enumerate(prompts):
            groups.setdefault((prompt.sampling, prompt.num_tokens), []).append(index)
        with tqdm(
            total=len(requests), desc="continuing texts", disable=disable_tqdm or None
        ) as progress:
            for group in groups.values():
                # Long ones first, as in `_score`.
                group.sort(key=lambda index: -len(prompts[index].ids))
                for indices in _in_groups(group, self._batch_size):
                    batch = self._continue([prompts[index] for index in indices])
                    for index, text in zip(indices, batch, strict=True):
                        texts[index] = text
                    progress.update(len(indices))
        return texts

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: object,
    ) -> list[tuple[float, bool]]:
        windows = []
        for _, context, continuation in requests:
            tokens = (context + continuation)[-(self._max_length + 1) :]
            windows.append((tokens[:-1], continuation[-(len(tokens) - 1) :]))
        return self._score(windows, disable_tqdm)

    @torch.no_grad()
    def _score(
        self, windows: list[tuple[list[int], list[int]]], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each window's predicted tokens, and whether they are the
        most probable ones.

        Args:
            windows: pairs of the input tokens, and the last tokens that they predict.
        """
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(windows)
        # Long ones first, so that the first pass shows whether all fit the memory.
        order = sorted(range(len(windows)), key=lambda index: -len(windows[index][0]))
        with tqdm(total=len(order), desc="scoring texts", disable=disable_tqdm or None) as progress:
            for indices in _in_groups(order, self._batch_size):
                for index, score in zip(
                    indices, self._score_batch([windows[i] for i in indices]), strict=True
                ):
                    scores[index] = score
                progress.update(len(indices))
        return scores

    def _score_batch(
        self, windows: list[tuple[list[int], list[int]]]
    ) -> Iterator[tuple[float, bool]]:
        longest = max(len(inputs) for inputs, _ in windows)
        rows = [inputs + [self.eot_token_id] * (longest - len(inputs)) for inputs, _ in windows]
        tokens = torch.tensor(rows, device=self._device)
        is_scored = torch.zeros_like(tokens, dtype=torch.bool)
        for row, (inputs, predicted) in enumerate(windows):
            is_scored[row, len(inputs) - len(predicted) : len(inputs)] = True

        def scored_logits(hidden: Tensor, head: nn.Module) -> Tensor:
            logits: Tensor = head(hidden[is_scored])
            return logits

        document_ids = torch.zeros_like(tokens, dtype=torch.int32)
        logits = self._model(tokens, document_ids, scored_logits).float()
        targets = torch.tensor(
            [token for _, predicted in windows for token in predicted], device=self._device
        )
        chances = logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
        is_largest = logits.argmax(dim=-1) == targets
        sizes = [len(predicted) for _, predicted in windows]
        for own, hits in zip(chances.split(sizes), is_largest.split(sizes), strict=True):
            yield own.double().sum().item(), bool(hits.all())

    def _prompt(self, context: str, settings: dict[str, Any]) -> "_Prompt":
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        num_tokens = min(
            int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS)), self._max_length - 1
        )
        ids = self.tok_encode(context)[-(self._max_length - num_tokens) :]
        is_drawn = settings.get("do_sample", False)
        sampling = Sampling(
            temperature=float(settings.get("temperature", 1.0)) if is_drawn else 0.0,
            top_k=settings.get("top_k"),
            top_p=settings.get("top_p"),
        )
        ends = [end for end in until if end]
        return _Prompt(ids or [self.eot_token_id], ends, num_tokens, sampling)

    def _continue(self, prompts: Sequence["_Prompt"]) -> list[str]:
        """Returns the continuations of prompts with one sampling and number of tokens."""
        sampling, num_tokens = prompts[0].sampling, prompts[0].num_tokens
        sampler = self._samplers.setdefault(sampling, Sampler(sampling))
        answers = [_Answer(self._tokenizer, prompt, self._stops) for prompt in prompts]
        ids = [prompt.ids for prompt in prompts]
        for tokens in continuations(self._model, ids, sampler, num_tokens, self._device):
            for answer, token in zip(answers, tokens, strict=True):
                answer.add(token)
            if all(answer.is_complete for answer in answers):
                break
        return [answer.text() for answer in answers]


@dataclass(frozen=True)
class _Prompt:
    """A text to continue."""

    ids: list[int]
    ends: list[str]
    """Strings that end the continuation."""
    num_tokens: int
    """The most new tokens."""
    sampling: Sampling


class _Answer:
    """The continuation of one prompt, which grows by a token at a time until it is complete.

    Args:
        stops: tokens that complete it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: _Prompt, stops: frozenset[int]) -> None:
        self.is_complete = False
        self._stream = TextStream(tokenizer, prompt.ids)
        self._ends = prompt.ends
        self._stops = stops
        self._text = ""

    def add(self, token: int) -> None:
        """Appends a token, unless the continuation is complete."""
        if self.is_complete or token in self._stops:
            self.is_complete = True
            return
        self._text += self._stream.add(token)
        self.is_complete = any(end in self._text for end in self._ends)

    def text(self) -> str:
        """Returns the text before the first of the strings that end it."""
        text = self._text + self._stream.rest()
        ends = [text.index(end) for end in self._ends if end in text]
        return text[: min(ends)] if ends else text


def _in_groups(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]

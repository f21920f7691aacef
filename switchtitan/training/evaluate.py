"""Loss over held-out batches, and continuations of prompts. Changes no weight."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from switchtitan.contracts import IGNORED_TARGET, Batch, LanguageModel, SummedLoss
from switchtitan.data.tokenizer import DocumentTokenizer
from switchtitan.distributed.fsdp import free_gathered_weights
from switchtitan.distributed.world import World
from switchtitan.errors import ConfigError
from switchtitan.training.stop import Stopped

if TYPE_CHECKING:
    from switchtitan.data.text import TextSize


class Evaluator:
    """Computes a model's loss on the same held-out tokens in every call.

    Args:
        batches: this rank's batches, read once per evaluation. All ranks have the same number, of
            the same shape.
        read_size: reads and returns the size of all ranks' text; None if it is not known.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        summed_loss: SummedLoss,
        world: World,
        read_size: "Callable[[], TextSize] | None" = None,
    ) -> None:
        self._batches = batches
        self._summed_loss = summed_loss
        self._world = world
        self._read_size = read_size

    def bits_per_byte(self, loss: float | None) -> float | None:
        """Returns a loss in bits per byte, None if unknown; takes seconds for many tokens."""
        if loss is None or self._read_size is None:
            return None
        return self._read_size().bits_per_byte(loss)

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, stop_is_due: Callable[[], int | None] = lambda: None
    ) -> float:
        """Returns the mean loss per held-out token over all ranks, in nats.

        Args:
            stop_is_due: see `Stop.is_due`; called between two batches.

        Raises:
            Stopped: if a stop is due; the model is as before.
        """
        device = self._world.device
        # [sum of losses, number of targets]. fp64 keeps long sums of fp32 numbers exact enough.
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        was_training = model.training
        model.eval()
        try:
            for batch in self._batches:
                tokens, targets, document_ids = batch.to(device)
                summed_loss = partial(self._summed_loss, targets=targets)
                totals[0] += model(tokens, document_ids, summed_loss)
                totals[1] += (targets != IGNORED_TARGET).sum()
                if (number := stop_is_due()) is not None:
                    raise Stopped(number)
        finally:
            model.train(was_training)
            free_gathered_weights(model)
        loss_sum, num_targets = self._world.sum(totals).tolist()
        return loss_sum / num_targets


class Prompts:
    """Texts that the model in training continues with the most probable tokens.

    Args:
        documents: the tokenizer of the model's corpus.
        num_tokens: of each continuation, at most.
        seq_len: of training, which prompt and continuation must not exceed.

    Raises:
        ConfigError: if a prompt is too long.
    """

    def __init__(
        self, prompts: Sequence[str], documents: DocumentTokenizer, num_tokens: int, seq_len: int
    ) -> None:
        # Most runs have no prompts.
        from switchtitan.generation.text import prompt_ids

        self._prompts, self._documents, self._num_tokens = prompts, documents, num_tokens
        # An empty prompt begins a document.
        self._tokens = [prompt_ids(documents.tokenizer, of) or [documents.eos_id] for of in prompts]
        for index, tokens in enumerate(self._tokens):
            if len(tokens) + num_tokens > seq_len:
                raise ConfigError(
                    f"[evaluation] prompts[{index}]: its {len(tokens)} tokens and prompt_tokens = "
                    f"{num_tokens} exceed [data] seq_len = {seq_len}; shorten it, or lower "
                    "prompt_tokens"
                )

    def __call__(self, model: LanguageModel) -> list[tuple[str, str]]:
        """Returns pairs of a prompt and its continuation, up to the end of its document.

        All ranks must call; they gather a sharded model's weights once for each token, and compute
        the same. Draws no random numbers.
        """
        from switchtitan.generation.decoding import continuations
        from switchtitan.generation.sampling import Sampler, Sampling

        greedy, device = Sampler(Sampling(temperature=0)), next(model.parameters()).device
        # Never ends early: the ranks' passes must be equally many, whatever they compute.
        steps = list(continuations(model, self._tokens, greedy, self._num_tokens, device))
        texts = map(self._text_after, self._tokens, zip(*steps, strict=True))
        return list(zip(self._prompts, texts, strict=True))

    def _text_after(self, tokens: Sequence[int], new: Sequence[int]) -> str:
        """Returns the text of `new` up to the end of the document of `tokens`."""
        new = list(takewhile(lambda token: token != self._documents.eos_id, new))
        decode = self._documents.tokenizer.decode
        text: str = decode([*tokens, *new])
        return text[len(decode(tokens)) :]


class Evaluators(NamedTuple):
    """What evaluates the model of a run."""

    validation: Evaluator
    test: Evaluator | None
    """Evaluates the trained model once; None without a test split."""
    prompts: Prompts | None = None
    """Continued after each evaluation on the validation split; None without prompts."""

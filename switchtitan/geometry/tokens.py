"""The loss of a model as a function of its weights, on held-out tokens."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from tqdm import tqdm

from switchtitan.contracts import IGNORED_TARGET, Batch, LanguageModel, ModelConfig
from switchtitan.data import build_validation_batches, open_corpus
from switchtitan.errors import ConfigError, CorpusError
from switchtitan.generation.saved_config import saved_config
from switchtitan.geometry.landscape import Weights
from switchtitan.geometry.runs import Run
from switchtitan.models import MODELS
from switchtitan.models.loss import CrossEntropy


def validation_batches(run: Run, num_tokens: int) -> list[Batch]:
    """Returns the first tokens of the validation split of a run's corpus, in sequences as in its
    training.

    Raises:
        ConfigError: if `num_tokens` are less than one sequence.
        CorpusError: if the corpus cannot be opened, or is not the one that the run trained on.
    """
    config = saved_config(run.metadata)
    seq_len = config.data.seq_len
    if num_tokens < seq_len:
        raise ConfigError(
            f"--tokens {num_tokens}: expected at least one sequence of {run.folder}, [data] "
            f"seq_len = {seq_len}; increase it"
        )
    corpus = open_corpus(config.data)
    trained_on = run.metadata.identity_value("corpus", "fingerprint")
    if corpus.fingerprint != trained_on:
        raise CorpusError(
            f"{corpus.folder}: its fingerprint is {corpus.fingerprint}, but the run trained on "
            f"{trained_on}; restore that corpus"
        )
    sequences = corpus.held_out_split("validation", seq_len)
    num_sequences = min(num_tokens // seq_len, len(sequences))
    size = min(config.training.local_batch_size, num_sequences)
    return list(
        build_validation_batches(
            sequences, num_sequences=num_sequences, local_batch_size=size, rank=0, num_ranks=1
        )
    )


def num_targets(batches: Sequence[Batch]) -> int:
    """Returns the number of tokens that are predicted."""
    return sum(int((batch.targets != IGNORED_TARGET).sum()) for batch in batches)


def load_model(config: ModelConfig, weights: Weights) -> LanguageModel:
    """Returns the plain model with these weights, which it does not copy."""
    with torch.device("meta"):
        model = MODELS.build(config)
    model.load_state_dict(dict(weights), assign=True)
    return model.requires_grad_(False).eval()


class LossOnTokens:
    """The mean loss per token in nats, in fp32, as a function of the plain model's weights.

    A rounding to bf16 would be as large as the offsets of a measurement.

    Args:
        batches: the same tokens in every call.
    """

    def __init__(self, config: ModelConfig, batches: Sequence[Batch], device: torch.device) -> None:
        self._config = config
        self._batches = [Batch(*(part.to(device) for part in batch)) for batch in batches]
        self._num_targets = num_targets(batches)
        self._summed_loss = CrossEntropy(compile_regions=False)

    @torch.no_grad()
    def __call__(self, weights: Weights) -> float:
        """Returns the loss. `weights`: fp32, on the device."""
        model = load_model(self._config, weights)
        total = 0.0
        for tokens, targets, document_ids in self._batches:
            summed = partial(self._summed_loss, targets=targets)
            total += model(tokens, document_ids, summed).double().item()
        return total / self._num_targets


def counting(loss: Callable[[Weights], float], bar: "tqdm[object]") -> Callable[[Weights], float]:
    """Returns a loss that also advances a progress bar in each call."""

    def counted(weights: Weights) -> float:
        value = loss(weights)
        bar.update()
        return value

    return counted

"""Batches of texts that are evaluated once, without a prepared corpus."""

from collections.abc import Iterator, Sequence

import torch

from switchtitan.contracts import IGNORED_TARGET, Batch
from switchtitan.data.sequences import document_ids


class TextBatches:
    """A rank's batches of a stream of tokens. Each token after the context is a target once.

    Sequence i holds tokens [i * seq_len, (i + 1) * seq_len]; the last one, and sequences that fill
    batches, are padded with `IGNORED_TARGET`. All ranks have the same number of batches of the same
    shape.

    Args:
        tokens: the stream, its context first.
        num_context: tokens that are no targets, at least one.
        eos_id: the token that ends a document.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        *,
        num_context: int,
        seq_len: int,
        eos_id: int,
        local_batch_size: int,
        rank: int,
        num_ranks: int,
    ) -> None:
        self.num_targets = len(tokens) - num_context
        num_sequences = -(-(len(tokens) - 1) // seq_len)
        self._num_batches = -(-num_sequences // (num_ranks * local_batch_size))
        num_padded = self._num_batches * num_ranks * local_batch_size * seq_len
        stream = torch.tensor(tokens)
        inputs = torch.full((num_padded,), eos_id)
        inputs[: len(tokens) - 1] = stream[:-1]
        targets = torch.full((num_padded,), IGNORED_TARGET)
        targets[num_context - 1 : len(tokens) - 1] = stream[num_context:]
        shape = (self._num_batches, num_ranks, local_batch_size, seq_len)
        self._inputs = inputs.view(shape)[:, rank]
        self._targets = targets.view(shape)[:, rank]
        self._eos_id = eos_id

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        for inputs, targets in zip(self._inputs, self._targets, strict=True):
            ids = torch.stack([document_ids(tokens, self._eos_id) for tokens in inputs])
            yield Batch(inputs, targets, ids)

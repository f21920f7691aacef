"""The sequences of a split, from memory-mapped token files."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from switchtitan.data.order import sequence_index


class TokenSequence(NamedTuple):
    """One sequence of a split."""

    tokens: Tensor
    """[seq + 1] int64: the inputs and, shifted by one, the targets."""
    document_ids: Tensor
    """[seq] int32: 0 at the start, one more after each end of a document."""


class TokenSequences(Dataset[TokenSequence]):
    """The sequences of one split: sequence i holds tokens [i * seq_len, (i + 1) * seq_len] of the
    joined shards.

    Consecutive sequences share one token, the last target of one and the first input of the next,
    so each token is a target once.

    Args:
        files: token files in order.
        token_counts: tokens in each file.
        dtype: "uint16" or "uint32", stored little-endian.
        seq_len: tokens per sequence.
        eos_id: the token that ends a document.
    """

    names = ("the training split",)

    def __init__(
        self,
        files: Sequence[Path],
        token_counts: Sequence[int],
        *,
        dtype: str,
        seq_len: int,
        eos_id: int,
    ) -> None:
        # Pickling a memory map copies all tokens; a worker process maps the files again instead.
        self._build = partial(
            TokenSequences, files, token_counts, dtype=dtype, seq_len=seq_len, eos_id=eos_id
        )
        self.seq_len = seq_len
        self.eos_id = eos_id
        self._ends = np.cumsum(np.asarray(token_counts, dtype=np.int64))
        stored = np.dtype(dtype).newbyteorder("<")
        self._shards = [
            np.memmap(file, dtype=stored, mode="r", shape=count)
            for file, count in zip(files, token_counts, strict=True)
        ]

    def __reduce__(self) -> tuple[object, ...]:
        return self._build, ()

    def __len__(self) -> int:
        return max(0, int(self._ends[-1]) - 1) // self.seq_len

    def __getitem__(self, index: int) -> TokenSequence:
        first = index * self.seq_len
        tokens = torch.from_numpy(self._read(first, first + self.seq_len + 1))
        return TokenSequence(tokens, document_ids(tokens[:-1], self.eos_id))

    def ordered(self, seed: int | None, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the indices of the sequences at positions [...] of the unshuffled order (seed
        None), or of the endless global order."""
        return positions if seed is None else sequence_index(seed, positions, len(self))

    @property
    def num_unshuffled(self) -> int:
        """Positions in the unshuffled order, which ends where the first source ends."""
        return len(self)

    def epochs(self, position: int) -> list[int]:
        """Returns how often each source was read to its end before a position of that order."""
        return [position // len(self)]

    def stretches(self, num_sequences: int) -> Iterator[NDArray[np.int64]]:
        """Yields the tokens of the first unshuffled sequences, joined where they are adjacent.

        The first token of each stretch is only the context of the others.
        """
        if num_sequences:
            yield self._read(0, num_sequences * self.seq_len + 1)

    def _read(self, first: int, end: int) -> NDArray[np.int64]:
        pieces = []
        shard = int(np.searchsorted(self._ends, first, side="right"))
        while first < end:
            tokens, shard_end = self._shards[shard], int(self._ends[shard])
            start = first - (shard_end - len(tokens))
            pieces.append(tokens[start : start + end - first])
            first, shard = shard_end, shard + 1
        return np.concatenate(pieces).astype(np.int64)


def document_ids(tokens: Tensor, eos_id: int) -> Tensor:
    """Document ids [seq] int32 of tokens [seq]: the number of `eos_id` before each token.

    An EOS belongs to the document that it ends."""
    ends = (tokens == eos_id).to(torch.int32)
    return torch.cumsum(ends, dim=0, dtype=torch.int32) - ends

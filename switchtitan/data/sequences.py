"""The sequences of a split, from memory-mapped token files."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenSequences:
    """The sequences of one corpus's split: sequence i, [seq + 1] int64, holds tokens
    [i * seq_len, (i + 1) * seq_len] of the joined shards.

    Consecutive sequences share one token, the last target of one and the first input of the next,
    so each token is a target once."""

    files: Sequence[Path]
    token_counts: Sequence[int]
    """Tokens in each file."""
    dtype: str
    """Of the files, little-endian."""
    seq_len: int
    eos_id: int
    """The token that ends a document."""

    def __getstate__(self) -> dict[str, object]:
        # Pickling a memory map copies all tokens; a worker process maps the files again instead.
        return {key: value for key, value in vars(self).items() if key != "_shards"}

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.token_counts)

    @cached_property
    def _shards(self) -> list[NDArray[Any]]:
        dtype = np.dtype(self.dtype).newbyteorder("<")
        counts = zip(self.files, self.token_counts, strict=True)
        return [np.memmap(file, dtype=dtype, mode="r", shape=count) for file, count in counts]

    def __len__(self) -> int:
        return max(0, int(self._ends[-1]) - 1) // self.seq_len

    def __getitem__(self, index: int) -> Tensor:
        first = index * self.seq_len
        return torch.from_numpy(self.read(first, first + self.seq_len + 1))

    def read(self, first: int, end: int) -> NDArray[np.int64]:
        """Returns tokens `first` to `end - 1` of the joined shards."""
        pieces = []
        shard = int(np.searchsorted(self._ends, first, side="right"))
        while first < end:
            tokens, shard_end = self._shards[shard], int(self._ends[shard])
            start = first - (shard_end - len(tokens))
            pieces.append(tokens[start : start + end - first])
            first, shard = shard_end, shard + 1
        return np.concatenate(pieces).astype(np.int64)


def document_ids(tokens: Tensor, eos_id: int) -> Tensor:
    """Document ids [..., seq] int32 of tokens [..., seq]: the number of `eos_id` before each token
    of its sequence. An EOS belongs to the document that it ends."""
    ends = (tokens == eos_id).to(torch.int32)
    return torch.cumsum(ends, dim=-1, dtype=torch.int32) - ends

"""The sequences of a split, from memory-mapped token files of one source or several."""

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from switchtitan.data.order import Schedule, sequence_index


class TokenFile(np.memmap[Any, Any]):
    """A memory-mapped file of tokens. Pickling an array copies it; a worker process maps the file
    again instead."""

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFile, (self.filename, self.dtype, "r", 0, self.shape)


@dataclass(frozen=True, eq=False)
class TokenSequences(Dataset[Tensor]):
    """The sequences of one corpus's split: sequence i, [seq + 1] int64, holds tokens
    [i * seq_len, (i + 1) * seq_len] of the joined shards.

    Consecutive sequences share one token, the last target of one and the first input of the next,
    so each token is a target once."""

    shards: Sequence[NDArray[Any]]
    """Each a `TokenFile`, or in memory."""
    seq_len: int
    eos_id: int
    """The token that ends a document."""

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate(map(len, self.shards), initial=0))

    def __len__(self) -> int:
        return max(0, self._starts[-1] - 1) // self.seq_len

    def __getitem__(self, index: int) -> Tensor:
        first = index * self.seq_len
        return torch.from_numpy(self.read(first, first + self.seq_len + 1))

    def read(self, first: int, end: int) -> NDArray[np.int64]:
        """Returns tokens `first` to `end - 1` of the joined shards."""
        first_shard, last_shard = (bisect(self._starts, at) - 1 for at in (first, end - 1))
        pieces = [
            self.shards[shard][max(first - self._starts[shard], 0) : end - self._starts[shard]]
            for shard in range(first_shard, last_shard + 1)
        ]
        return np.concatenate(pieces).astype(np.int64)


class Sequences(ConcatDataset[Tensor]):
    """The sequences of a split of one source or several.

    Index i is sequence i of the first source, then of the second one, and so on. In the endless
    global order, a source that ends starts again in another order. `names` are for messages.
    """

    def __init__(
        self, parts: Sequence[TokenSequences], names: Sequence[str], schedule: Schedule
    ) -> None:
        super().__init__(parts)
        self._parts, self._schedule = tuple(parts), schedule
        self.names, self.seq_len, self.eos_id = tuple(names), parts[0].seq_len, parts[0].eos_id
        self._starts = np.array([0, *self.cumulative_sizes])

    def ordered(self, seed: int | None, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the indices of the sequences at positions [...] of the unshuffled order (seed
        None), or of the global order."""
        sources, places = self._schedule.places(positions)
        indices = self._starts[sources]
        for source, part in enumerate(self._parts):
            is_own = sources == source
            own = places[is_own]
            indices[is_own] += own if seed is None else sequence_index(seed, own, len(part))
        return indices

    @property
    def num_unshuffled(self) -> int:
        """Positions in the unshuffled order, which ends where the first source ends."""
        return min(self._schedule.position_of(k, len(part)) for k, part in enumerate(self._parts))

    def epochs(self, position: int) -> list[int]:
        """Returns how often each source was read to its end before a position of the orders."""
        given = self._schedule.num_given(position)
        return [number // len(part) for number, part in zip(given, self._parts, strict=True)]

    def stretches(self, num_sequences: int) -> Iterator[NDArray[np.int64]]:
        """Yields the tokens of the first unshuffled sequences, joined where they are adjacent.

        The first token of each stretch is only the context of the others.
        """
        for part, number in zip(self._parts, self._schedule.num_given(num_sequences), strict=True):
            if number:
                yield part.read(0, number * self.seq_len + 1)


def document_ids(tokens: Tensor, eos_id: int) -> Tensor:
    """Document ids [..., seq] int32 of tokens [..., seq]: the number of `eos_id` before each token
    of its sequence. An EOS belongs to the document that it ends."""
    ends = (tokens == eos_id).to(torch.int32)
    return torch.cumsum(ends, dim=-1, dtype=torch.int32) - ends

"""The sequences of a split, from memory-mapped token files of one source or several, and the global
order: which source has the sequence at a position, and which one of it that is."""

import hashlib
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from switchtitan.errors import ConfigError

_ROUNDS = 8
"""Four rounds make a Feistel network with wide halves a strong pseudo-random permutation (Luby and
Rackoff 1988). Small corpora have narrow halves, which need more rounds."""
PERIOD = 10_000
"""Positions after which the choice of sources repeats, not that of their sequences; weights are
rounded to multiples of one in 10 000."""


def sequence_index(seed: int, position: NDArray[np.int64], num_sequences: int) -> NDArray[np.int64]:
    """Returns the sequences at positions [...] of the endless global order, from 0.

    Epoch e covers positions [e * num_sequences, (e + 1) * num_sequences) and visits every sequence
    once, in its own order.
    """
    epochs, offsets = np.divmod(np.asarray(position, dtype=np.int64), num_sequences)
    indices = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = permute(offsets[chosen], num_sequences, seed=seed, epoch=int(epoch))
    return indices


def permute(offsets: NDArray[np.int64], size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Maps offsets [...] in [0, size) through a bijection of [0, size) that (seed, epoch) chooses.

    A balanced Feistel network permutes [0, 2^(2h)), the smallest such range that holds `size`. A
    value outside [0, size) is permuted again until it is inside, which keeps the map a bijection
    (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 3). The
    range is below 4 * size, so few values need many passes."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    values = offsets.astype(np.uint64).reshape(-1)
    outside = np.arange(values.size)
    while outside.size:
        left, right = values[outside] >> shift, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        values[outside] = (left << shift) | right
        outside = outside[values[outside] >= size]
    return values.astype(np.int64).reshape(offsets.shape)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators")."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Schedule:
    """Sources by position. Of the first p positions, source k has `counts[k] / PERIOD * p` of them,
    within one."""

    counts: tuple[int, ...]
    """[sources], positions of each source in a period; they add up to `PERIOD`."""

    @cached_property
    def _sources(self) -> NDArray[np.int64]:
        """[PERIOD], the source at each position.

        R. Tijdeman, "The chairman assignment problem" (1980): of the sources that are behind, the
        one whose next turn is due first. With exact integers, so that all machines agree.
        """
        slack = max(2 * len(self.counts) - 2, 1)
        given, chosen = [0] * len(self.counts), list[int]()
        for position in range(1, PERIOD + 1):
            due = {
                source: Fraction(slack * (given[source] + 1) - 1, count)
                for source, count in enumerate(self.counts)
                if slack * (count * position - PERIOD * given[source]) >= PERIOD
            }
            chosen.append(min(due, key=due.__getitem__))
            given[chosen[-1]] += 1
        return np.array(chosen)

    @cached_property
    def _counts_before(self) -> NDArray[np.int64]:
        """[PERIOD + 1, sources], positions of each source before a position."""
        is_of = self._sources[:, None] == np.arange(len(self.counts))
        return np.concatenate([np.zeros((1, len(self.counts)), np.int64), np.cumsum(is_of, axis=0)])

    def places(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the source of each position, and the position in that source's own order."""
        periods, offsets = np.divmod(positions, PERIOD)
        sources = self._sources[offsets]
        within = self._counts_before[offsets, sources]
        return sources, periods * np.asarray(self.counts)[sources] + within

    def num_given(self, position: int) -> list[int]:
        """Returns how many of the positions below `position` each source has."""
        periods, offset = divmod(position, PERIOD)
        return (periods * np.asarray(self.counts) + self._counts_before[offset]).tolist()

    def position_of(self, source: int, number: int) -> int:
        """Returns the position of a source's sequence `number`, counted from 0."""
        periods, rest = divmod(number, self.counts[source])
        return periods * PERIOD + int(np.flatnonzero(self._sources == source)[rest])


def schedule_of(weights: Sequence[float]) -> Schedule:
    """Returns the schedule whose shares are the weights, rounded to multiples of one in 10 000.
    Raises a ConfigError if a weight would be rounded to nothing."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights) * PERIOD
    counts = np.floor(shares).astype(int)
    remainders = np.argsort(-(shares - counts), kind="stable")
    counts[remainders[: PERIOD - int(counts.sum())]] += 1
    if not counts.all():
        small = int(np.argmin(counts))
        raise ConfigError(
            f"[data] sources[{small}].weight = {weights[small]}: expected at least one part in "
            f"{PERIOD:,} of all weights; increase it, or leave the source out"
        )
    return Schedule(tuple(counts.tolist()))


ONE_SOURCE = Schedule((PERIOD,))


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

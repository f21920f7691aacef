"""Mixtures: which source the sequence at a position of the global order comes from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from switchtitan.data.order import sequence_index
from switchtitan.data.sequences import TokenSequences
from switchtitan.errors import ConfigError

PERIOD = 10_000
"""Positions after which the choice of sources repeats, not that of their sequences; weights are
rounded to multiples of one in 10 000."""


@dataclass(frozen=True)
class Schedule:
    """Sources by position. Of the first p positions, source k has `counts[k] / PERIOD * p` of them,
    within one.

    Args:
        counts: [sources], positions of each source in a period; they add up to `PERIOD`.
    """

    counts: tuple[int, ...]

    @cached_property
    def _sources(self) -> NDArray[np.int64]:
        """[PERIOD], the source at each position.

        R. Tijdeman, "The chairman assignment problem" (1980): of the sources that are behind, the
        one whose next turn is due first. With exact integers, so that all machines agree.
        """
        slack = max(2 * len(self.counts) - 2, 1)
        given, chosen = [0] * len(self.counts), list[int]()
        for position in range(1, PERIOD + 1):
            due = dict[int, Fraction]()
            for source, count in enumerate(self.counts):
                # Its share less what it was given, times PERIOD.
                behind = count * position - PERIOD * given[source]
                if slack * behind >= PERIOD:
                    due[source] = Fraction(PERIOD * (slack - 1) - slack * behind, count)
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


class Sequences(Dataset[Tensor]):
    """The sequences of a split of one source or several.

    Index i is sequence i of the first source, then of the second one, and so on. In the endless
    global order, a source that ends starts again in another order. `names` are for messages.
    """

    def __init__(
        self, parts: Sequence[TokenSequences], names: Sequence[str], schedule: Schedule
    ) -> None:
        self._parts, self._schedule = tuple(parts), schedule
        self.names, self.seq_len, self.eos_id = tuple(names), parts[0].seq_len, parts[0].eos_id
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Tensor:
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[source][index - int(self._starts[source])]

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

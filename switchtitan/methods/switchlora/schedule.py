"""Which vectors are switched at which step: integers only, a pure function of step and layer."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from switchtitan.distributed.shards import Spans
from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.rate import switch_rate

_GOLDEN_RATIO = (1 + 5**0.5) / 2

FACTOR_A, FACTOR_B = FACTORS = 0, 1
"""Indices of A and B in tables [2, layers, rank]. Vectors i of A and of B are counterparts."""


class VectorSpan(NamedTuple):
    """Consecutive vectors of one factor of one layer."""

    factor: int
    layer: int
    vectors: range


class SwitchSchedule:
    """The number of vectors of each factor that each layer requests to switch at a step.

    Error diffusion meets the expectation rank * rate(t) / interval, with Q its running sum:
    k(t) = floor(Q(t) + phase) - floor(Q(t-1) + phase). The phase is a low-discrepancy sequence over
    layers, so that layers switch at different steps. (The original implementation draws the
    fraction from each rank's global generator: the same expectation with more variance.)
    """

    def __init__(self, config: SwitchLoraConfig, num_steps: int, num_layers: int) -> None:
        # rank * (sum of rates) / interval, in this order: exact where the quotient is an integer.
        rates = switch_rate(config.decay, config.decay_ratio, num_steps)
        running_sum = config.rank * np.cumsum(rates) / config.interval_in(num_steps)
        self._running_sum = np.concatenate([[0.0], running_sum])
        # i + 0.5 keeps phases away from 0 and 1, where rounding of the sum could delay a switch.
        self._phase = (np.arange(num_layers) + 0.5) / _GOLDEN_RATIO % 1.0

    def requested(self, step: int) -> np.ndarray:
        """Returns the request at `step` 0, 1, ..., [layers]; zeros after the last step."""
        if step + 1 >= len(self._running_sum):
            return np.zeros(len(self._phase), dtype=np.int64)
        before, after = self._running_sum[step : step + 2]
        return (np.floor(after + self._phase) - np.floor(before + self._phase)).astype(np.int64)


class SwitchCounts:
    """Counts of switched vectors for all layers.

    Attributes:
        step: optimizer steps done.
        num_switched: [layers], vectors of each factor so far.
        recent: [freeze_steps - 1, layers], the same by step, newest first: counterparts still
            frozen.
    """

    def __init__(self, num_layers: int, freeze_steps: int) -> None:
        self.step = 0
        self.num_switched = np.zeros(num_layers, dtype=np.int64)
        self.recent = np.zeros((max(freeze_steps - 1, 0), num_layers), dtype=np.int64)

    def limited(
        self,
        requested: np.ndarray,
        rank: int,
        num_candidates: np.ndarray,
        window: int,
    ) -> np.ndarray:
        """Limits a request to the vectors of each factor that may be switched now, [layers].

        No vector is switched while it is frozen, and no candidate is taken and overwritten at once:
        k <= window - (frozen vectors of one factor) and k <= candidates - rank.

        Args:
            window: see `SwitchOrder`.
        """
        allowed = np.minimum(window - self.recent.sum(0), num_candidates - rank)
        return np.clip(requested, 0, np.maximum(allowed, 0))

    def advance(self, counts: np.ndarray) -> None:
        """Adds the switched vectors, [layers], and ends the step."""
        self.num_switched += counts
        if len(self.recent):
            self.recent = np.concatenate([counts[None], self.recent[:-1]])
        self.step += 1


@dataclass(frozen=True)
class LayerSwitch:
    """The switch of one layer in one step: equally many vectors of A and of B."""

    layer: int
    """Index among all layers."""
    vectors: tuple[Spans, Spans]
    """Rows of A and rows of B to exchange. They are disjoint."""
    slots_in: Spans
    """Candidates taken, for each factor."""
    slots_out: Spans
    """Candidates overwritten by the outgoing vectors, for each factor."""

    @property
    def num_vectors(self) -> int:
        """Number of switched vectors of each factor."""
        return sum(map(len, self.slots_in))

    def switched(self) -> list[VectorSpan]:
        """Returns the vectors that are exchanged."""
        return [
            VectorSpan(factor, self.layer, span)
            for factor in FACTORS
            for span in self.vectors[factor]
        ]

    def counterparts(self) -> list[VectorSpan]:
        """Returns their counterparts in the other factor."""
        return [
            VectorSpan(1 - factor, self.layer, span)
            for factor in FACTORS
            for span in self.vectors[factor]
        ]


def plan_layer_switch(
    layer: int, num_switched: int, count: int, rank: int, num_candidates: int
) -> LayerSwitch:
    """Plans a switch of the next `count` vectors in ring order.

    All of SwitchLoRA's pointers follow from `num_switched`.
    """
    return LayerSwitch(
        layer=layer,
        vectors=(
            ring_spans(num_switched, count, rank),
            ring_spans(rank // 2 + num_switched, count, rank),
        ),
        slots_in=ring_spans(num_switched, count, num_candidates),
        slots_out=ring_spans(num_switched - rank, count, num_candidates),
    )


def ring_spans(start: int, count: int, size: int) -> Spans:
    """Returns `count` <= `size` consecutive places from `start` on a ring, as one or two spans."""
    start %= size
    stop = start + count
    if stop <= size:
        return (range(start, stop),)
    return (range(start, size), range(stop - size))


def initial_slots(rank: int, num_candidates: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the candidates that the initial vectors of A and B are copies of, [rank] each.

    The last `rank` of the ring, with B's rotated by half a rank.
    """
    slots = num_candidates - rank + np.arange(rank)
    return slots, np.roll(slots, rank // 2)

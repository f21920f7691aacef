"""When vectors are switched and which: integers only, a pure function of step and layer."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from switchtitan.distributed.shards import Spans
from switchtitan.methods.switchlora.config import SwitchLoraConfig

_GOLDEN_RATIO = (1 + 5**0.5) / 2

FACTOR_A, FACTOR_B = FACTORS = 0, 1
"""Places of A and of B in tables [2, layers, rank]; vector i of one is the counterpart of vector i of the other."""


class VectorSpan(NamedTuple):
    """Neighbouring vectors of one factor of one layer."""

    factor: int
    layer: int
    vectors: range


def switch_rate(config: SwitchLoraConfig, num_steps: int) -> np.ndarray:
    """The factor on the switching frequency at every step, [num_steps].

    "exponential" 0.3^((t+1) / (decay_ratio T)), "constant" 1, "sigmoid" 1 - 1/(1 + exp(-10 (t / (decay_ratio T) - 1))).
    """
    t = np.arange(num_steps, dtype=np.float64)
    horizon = config.decay_ratio * num_steps
    if config.decay == "exponential":
        return 0.3 ** ((t + 1) / horizon)
    if config.decay == "sigmoid":
        return 1 - 1 / (1 + np.exp(-10 * (t / horizon - 1)))
    return np.ones(num_steps)


class SwitchSchedule:
    """How many vectors of each factor each layer asks to switch at a step.

    The expectation rank * rate(t) / interval is met by error diffusion: k(t) = floor(Q(t) + phase) - floor(Q(t-1) + phase), Q
    its running sum and the phase a low-discrepancy sequence over layers, so that layers take turns. (The original draws the
    fraction from each rank's global generator; the expectation is the same, the variance is not.)
    """

    def __init__(self, config: SwitchLoraConfig, num_steps: int, num_layers: int) -> None:
        # rank * (sum of rates) / interval, in this order: exact where the quotient is an integer.
        running_sum = config.rank * np.cumsum(switch_rate(config, num_steps)) / config.interval
        self._running_sum = np.concatenate([[0.0], running_sum])
        # Odd halves: never near 0 or 1, where a sum that rounding leaves just below an integer would switch a step late.
        self._phase = (np.arange(num_layers) + 0.5) / _GOLDEN_RATIO % 1.0

    def requested(self, step: int) -> np.ndarray:
        """Vectors asked for at `step` 0, 1, ..., [layers]; none after the last step of the schedule."""
        if step + 1 >= len(self._running_sum):
            return np.zeros(len(self._phase), dtype=np.int64)
        before, after = self._running_sum[step : step + 2]
        return (np.floor(after + self._phase) - np.floor(before + self._phase)).astype(np.int64)


class SwitchCounts:
    """Vectors switched so far, and in the steps whose counterparts are still frozen, for all layers.

    Attributes:
        step: optimizer steps done.
        num_switched: [layers], of each factor.
        recent: [freeze_steps - 1, layers], newest first.
    """

    def __init__(self, num_layers: int, freeze_steps: int) -> None:
        self.step = 0
        self.num_switched = np.zeros(num_layers, dtype=np.int64)
        self.recent = np.zeros((max(freeze_steps - 1, 0), num_layers), dtype=np.int64)

    def limited(self, requested: np.ndarray, rank: int, num_candidates: np.ndarray) -> np.ndarray:
        """How much of a request may be switched now, of each factor, [layers].

        A vector may not be switched while it is frozen, nor a candidate be taken in and put back at once:
        k <= floor(rank / 2) - (frozen vectors of one factor) and k <= candidates - rank.
        """
        allowed = np.minimum(rank // 2 - self.recent.sum(0), num_candidates - rank)
        return np.clip(requested, 0, np.maximum(allowed, 0))

    def advance(self, counts: np.ndarray) -> None:
        """Counts vectors as switched, [layers], and ends the step."""
        self.num_switched += counts
        if len(self.recent):
            self.recent = np.concatenate([counts[None], self.recent[:-1]])
        self.step += 1


@dataclass(frozen=True)
class LayerSwitch:
    """What one layer switches in one step: as many vectors of A as of B."""

    layer: int
    """Its place among all layers."""
    vectors: tuple[Spans, Spans]
    """Rows of A, rows of B: those that are exchanged for candidates. They have no place in common."""
    slots_in: Spans
    """Candidates taken in, of either factor."""
    slots_out: Spans
    """Candidates overwritten by the vectors that leave, of either factor."""

    @property
    def num_vectors(self) -> int:
        """Of each factor."""
        return sum(map(len, self.slots_in))

    def switched(self) -> list[VectorSpan]:
        """The vectors that are exchanged."""
        return [
            VectorSpan(factor, self.layer, span)
            for factor in FACTORS
            for span in self.vectors[factor]
        ]

    def counterparts(self) -> list[VectorSpan]:
        """Their counterparts in the other factor."""
        return [
            VectorSpan(1 - factor, self.layer, span)
            for factor in FACTORS
            for span in self.vectors[factor]
        ]


def plan_layer_switch(
    layer: int, num_switched: int, count: int, rank: int, num_candidates: int
) -> LayerSwitch:
    """The next `count` vectors in ring order, after `num_switched` (SwitchLoRA's pointers, all derived from that number)."""
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
    """`count` neighbours from `start` on a ring of `size` places, as one span or two; `count` <= `size`."""
    start %= size
    stop = start + count
    if stop <= size:
        return (range(start, stop),)
    return (range(start, size), range(stop - size))


def initial_slots(rank: int, num_candidates: int) -> tuple[np.ndarray, np.ndarray]:
    """The candidates with which the vectors of A and of B start, [rank] each: the last ones of the ring, B's rotated by half a
    rank."""
    slots = num_candidates - rank + np.arange(rank)
    return slots, np.roll(slots, rank // 2)

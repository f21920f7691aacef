"""Which vectors are switched, frozen and reset at which step: integers, the same on every rank."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from switchtitan.distributed.shards import Spans
from switchtitan.methods.switchlora.config import SwitchLoraConfig

_GOLDEN_RATIO = (1 + 5**0.5) / 2

FACTOR_A, FACTOR_B = FACTORS = 0, 1
"""Indices of A and B in tables [2, layers, rank]. Vectors i of A and of B are counterparts."""


class VectorSpan(NamedTuple):
    """Consecutive vectors of one factor of one layer."""

    factor: int
    layer: int
    vectors: range


class Switch(NamedTuple):
    """The switch of one layer in one step: equally many vectors of A and of B."""

    layer: int
    """Index among all layers."""
    num_vectors: int
    """Switched vectors of each factor."""
    vectors: tuple[Spans, Spans]
    """Rows of A and rows of B to exchange. They are disjoint."""
    slots_in: Spans
    """Candidates taken, for each factor."""
    slots_out: Spans
    """Candidates overwritten by the outgoing vectors, for each factor."""


class Plan:
    """The schedule of all layers, and the history that later switches follow from.

    Error diffusion meets the expectation rank * rate(t) / interval, with Q its running sum: a layer
    switches floor(Q(t) + phase) - floor(Q(t-1) + phase) vectors of each factor. The phase is a
    low-discrepancy sequence over layers, so that layers switch at different steps. (The authors'
    code draws the fraction at random.)

    Args:
        num_steps: length of the run.
        num_candidates: of each layer and factor, [layers].

    Attributes:
        step: optimizer steps done.
        num_switched: [layers], vectors of each factor so far. All pointers follow from it.
        last_switched: [2, layers, rank], the step of each vector's last switch. Freezing, resets
            and step counts of its counterpart follow from it.
    """

    def __init__(
        self, config: SwitchLoraConfig, num_steps: int, num_candidates: np.ndarray
    ) -> None:
        self._config, self.num_candidates = config, num_candidates
        # rank * (sum of rates) / interval, in this order: exact where the quotient is an integer.
        running_sum = config.rank * np.cumsum(config.rates(num_steps))
        self._running_sum = np.concatenate([[0.0], running_sum / config.interval_in(num_steps)])
        # i + 0.5 keeps phases away from 0 and 1, where rounding of the sum could delay a switch.
        self._phase = (np.arange(len(num_candidates)) + 0.5) / _GOLDEN_RATIO % 1.0
        self.step = 0
        self.num_switched = np.zeros(len(num_candidates), dtype=np.int64)
        shape = len(FACTORS), len(num_candidates), config.rank
        self.last_switched = np.full(shape, -1 - config.freeze_steps, dtype=np.int64)

    def next(self) -> list[Switch]:
        """Returns the switches of the coming step, of layers with any."""
        counts = self.limited(self.requested())
        return [self.switch(layer, int(counts[layer])) for layer in np.flatnonzero(counts).tolist()]

    def requested(self) -> np.ndarray:
        """Returns the vectors of each factor due in the coming step, [layers]; 0 after the run."""
        last = len(self._running_sum) - 1
        before, after = self._running_sum[[min(self.step, last), min(self.step + 1, last)]]
        counts = np.floor(after + self._phase) - np.floor(before + self._phase)
        return counts.astype(np.int64)

    def limited(self, requested: np.ndarray) -> np.ndarray:
        """Limits a request to the vectors of each factor that may be switched now, [layers].

        No vector is switched while it is frozen, and no candidate is taken and overwritten at once.
        """
        rank = self._config.rank
        is_frozen = self.step - self.last_switched[FACTOR_A] < self._config.freeze_steps
        allowed = np.minimum(rank // 2 - is_frozen.sum(1), self.num_candidates - rank)
        return np.clip(requested, 0, np.maximum(allowed, 0))

    def switch(self, layer: int, count: int) -> Switch:
        """Returns the switch of the next `count` vectors of each factor of a layer."""
        rank, candidates = self._config.rank, int(self.num_candidates[layer])
        first = int(self.num_switched[layer])
        return Switch(
            layer,
            count,
            vectors=(ring_spans(first, count, rank), ring_spans(rank // 2 + first, count, rank)),
            slots_in=ring_spans(first, count, candidates),
            slots_out=ring_spans(first - rank, count, candidates),
        )

    def advance(self, switches: list[Switch]) -> None:
        """Adds the switches of the coming step, which is then the last one."""
        for switch in switches:
            self.num_switched[switch.layer] += switch.num_vectors
            for factor, spans in enumerate(switch.vectors):
                for span in spans:
                    self.last_switched[factor, switch.layer, span.start : span.stop] = self.step
        self.step += 1

    def is_frozen(self) -> np.ndarray:
        """Returns which vectors the last step does not update, [2, layers, rank] bool."""
        of_counterparts = self.last_switched[::-1]
        return self.step - 1 - of_counterparts < self._config.freeze_steps

    def num_updates(self) -> np.ndarray:
        """Returns the steps since each vector's state was reset, the last step and those in which
        it was frozen included, [2, layers, rank]."""
        last_reset = self.last_switched[::-1]
        if self._config.reset_moments == "both":
            last_reset = np.maximum(last_reset, self.last_switched)
        elif self._config.reset_moments != "counterpart":
            last_reset = np.zeros_like(last_reset)
        return self.step - np.maximum(last_reset, 0)

    def resets(self) -> list[VectorSpan]:
        """Returns the vectors whose state the last step's switch resets."""
        is_switched = self.last_switched == self.step - 1
        if self._config.reset_moments == "none":
            return []
        is_both = self._config.reset_moments == "both"
        return vector_spans(is_switched[::-1] | is_switched if is_both else is_switched[::-1])

    def state_dict(self) -> dict[str, Tensor]:
        """Returns `switch.step`, `switch.num_switched` and `switch.last_switched`."""
        return {
            "switch.step": torch.tensor(self.step),
            "switch.num_switched": torch.from_numpy(self.num_switched.copy()),
            "switch.last_switched": torch.from_numpy(self.last_switched.copy()),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.step = int(state["switch.step"])
        self.num_switched = state["switch.num_switched"].cpu().numpy().copy()
        self.last_switched = state["switch.last_switched"].cpu().numpy().copy()


def ring_spans(start: int, count: int, size: int) -> Spans:
    """Returns `count` <= `size` consecutive places from `start` on a ring, as one or two spans."""
    start %= size
    stop = start + count
    return (range(start, stop),) if stop <= size else (range(start, size), range(stop - size))


def vector_spans(table: np.ndarray) -> list[VectorSpan]:
    """Returns the true entries of a table [2, layers, rank], neighbours together."""
    edges = np.diff(np.pad(table, ((0, 0), (0, 0), (1, 1))).astype(np.int8), axis=2)
    starts, stops = np.argwhere(edges == 1).tolist(), np.argwhere(edges == -1).tolist()
    return [
        VectorSpan(factor, layer, range(start, stop[2]))
        for (factor, layer, start), stop in zip(starts, stops, strict=True)
    ]

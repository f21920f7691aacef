"""The order in which a layer's vectors are switched: in turn, or those that move least first."""

import zlib
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from switchtitan.distributed.host_copies import CopyToHost, HostCopies
from switchtitan.distributed.shards import Spans
from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.schedule import (
    FACTOR_A,
    FACTOR_B,
    FACTORS,
    LayerSwitch,
    plan_layer_switch,
    ring_spans,
)

_STEPS_TO_ARRIVE = 2
"""Steps after which a table copied to the host is read: its copy has finished by then."""
_MOVING = 1e30
"""Movement of a vector that has had no gradient since its counterpart was switched."""


class SwitchOrder(Protocol):
    """Decides which vectors are switched next, from counts and measurements equal on all ranks.

    Attributes:
        window: the most vectors of each factor that may be switched or frozen at a time.
        checksum: of what does not follow from counts; 0 if all does.
    """

    window: int
    checksum: int = 0

    def plan(self, layer: int, num_switched: int, count: int, num_candidates: int) -> LayerSwitch:
        """Plans a switch of the next `count` vectors of each factor.

        Args:
            num_switched: vectors of each factor switched so far.
        """
        ...

    def due(self, num_switched: np.ndarray) -> np.ndarray:
        """Returns the layers whose order is to be measured now. Default: none."""
        return np.empty(0, dtype=np.int64)

    def measure(self, layers: np.ndarray, step: int, movement: Tensor) -> None:
        """Measures layers which are due.

        Args:
            movement: [2, layers, rank], of all layers, before the switch at `step`.
        """
        return None

    def advance(self, step: int, num_switched: np.ndarray, switches: list[LayerSwitch]) -> None:
        """Ends the switch of a step, after which `num_switched` vectors [layers] were switched."""
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """Returns what does not follow from counts; the same on every rank. Default: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Loads what `state_dict` returned. Default: nothing."""
        return None


class RingOrder(SwitchOrder):
    """The order of the original implementation: a pure function of `num_switched`."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self.window = rank // 2

    def plan(self, layer: int, num_switched: int, count: int, num_candidates: int) -> LayerSwitch:
        return plan_layer_switch(layer, num_switched, count, self._rank, num_candidates)


@dataclass(frozen=True)
class _Measurement:
    step: int
    layers: np.ndarray
    """Whose order it decides, [n]."""
    divisors: np.ndarray
    """[2, layers, rank], see `_divisors`."""
    movement: CopyToHost
    """[2, layers, rank]."""


class LeastMovingOrder(SwitchOrder):
    """Switches first the vectors that move least. Every vector is switched as often as in a ring.

    A lap of `rank` switches of each factor has two halves. Each half switches one vector of every
    pair of counterparts: A's of some pairs and B's of the others; the next half switches their
    counterparts. (So does a ring of even rank.) The order within a half is free except for one
    rule: at least `window` switches are between those of two counterparts. Then the vectors of a
    step are disjoint and none of them is frozen, as in a ring. A half is sorted by movement,
    measured before it begins. Equal movements, as before the first measurement, keep the order of
    the previous half, which is that of a ring.

    The movement of a vector is |m| / |g|: its gradients' running mean m, as the optimizer has it,
    divided by the sum of their weights in it, over its gradient g. It is 1 if all gradients are
    equal; if they cancel out, so do the vector's steps. The sum is 1 - beta^n for n gradients since
    a reset, and falls by beta in a step in which the vector is frozen.

    Args:
        momentum: beta of the running mean.
        device: of the measurements.
    """

    def __init__(
        self, config: SwitchLoraConfig, num_steps: int, num_layers: int, momentum: float,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._config, self._momentum = config, momentum
        rank = config.rank
        self._half = rank // 2
        self.window = -(-rank // 4)
        # Switches in a measurement's step, the one before, and those until it is read.
        per_step = rank / config.interval_in(num_steps)
        self._lead = min(self._half, int(np.ceil((2 + _STEPS_TO_ARRIVE) * per_step)))
        # Of the current half: A's vectors in order, then B's, [layers, rank]; then of the next.
        self._current = np.tile(np.arange(rank), (num_layers, 1))
        self._next = np.full_like(self._current, -1)
        # Steps of each vector's last switch; at first as if no counterpart had been frozen since.
        self._last_switched = np.full((len(FACTORS), num_layers, rank), -config.freeze_steps)
        # `_divisors` at the last switch of each vector's counterpart: what is left after its reset.
        self._kept_weights = np.zeros(self._last_switched.shape)
        # Without frozen steps, they follow from the number of steps.
        self._keeps_moments = config.reset_moments == "none" and config.freeze_steps > 0
        self._measurements: deque[_Measurement] = deque()
        self._copies = HostCopies(device)
        self.checksum = zlib.crc32(self._current.tobytes())

    def plan(self, layer: int, num_switched: int, count: int, num_candidates: int) -> LayerSwitch:
        first = num_switched % self._half
        places = slice(first, first + count)
        of_a, of_b = (half[places].tolist() for half in self._halves(self._current, layer))
        num_left = count - len(of_a)
        if num_left:
            self._decide(layer)
            for vectors, half in zip((of_a, of_b), self._halves(self._next, layer), strict=True):
                vectors += half[:num_left].tolist()
        return LayerSwitch(
            layer=layer,
            vectors=(_spans(of_a), _spans(of_b)),
            slots_in=ring_spans(num_switched, count, num_candidates),
            slots_out=ring_spans(num_switched - self._config.rank, count, num_candidates),
        )

    def due(self, num_switched: np.ndarray) -> np.ndarray:
        left = self._half - num_switched % self._half
        awaited = {layer for measured in self._measurements for layer in measured.layers.tolist()}
        is_open = self._next[:, 0] < 0
        is_open[list(awaited)] = False
        is_due = is_open & (left <= self._lead)
        # Layers differ by a switch or so: one measurement serves all.
        return np.flatnonzero(is_open & is_due.any() & (left <= self._lead + 1))

    def measure(self, layers: np.ndarray, step: int, movement: Tensor) -> None:
        copy = self._copies.to_host(movement.clone())
        self._measurements.append(_Measurement(step, layers, self._divisors(step), copy))

    def advance(self, step: int, num_switched: np.ndarray, switches: list[LayerSwitch]) -> None:
        divisors = self._divisors(step) if self._keeps_moments and switches else self._kept_weights
        for switch in switches:
            for factor, layer, vectors in switch.counterparts():
                places = factor, layer, slice(vectors.start, vectors.stop)
                self._kept_weights[places] = divisors[places]
            for factor, layer, vectors in switch.switched():
                self._last_switched[factor, layer, vectors.start : vectors.stop] = step
        counts = np.zeros_like(num_switched)
        counts[[switch.layer for switch in switches]] = [switch.num_vectors for switch in switches]
        begun = np.flatnonzero(num_switched // self._half > (num_switched - counts) // self._half)
        if len(begun):
            for layer in begun.tolist():
                self._decide(layer)
            self._current[begun] = self._next[begun]
            self._next[begun] = -1
            self.checksum = zlib.crc32(self._current.tobytes())
        while self._measurements and step - self._measurements[0].step >= _STEPS_TO_ARRIVE:
            self._read()

    def state_dict(self) -> dict[str, Tensor]:
        while self._measurements:
            self._read()
        tables = {
            "order": self._current,
            "next_order": self._next,
            "last_switched": self._last_switched,
        }
        if self._keeps_moments:
            tables["kept_weights"] = self._kept_weights
        return {key: torch.from_numpy(table.copy()) for key, table in tables.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._measurements.clear()
        self._current, self._next, self._last_switched = (
            state[key].cpu().numpy().copy() for key in ("order", "next_order", "last_switched")
        )
        if self._keeps_moments:
            self._kept_weights = state["kept_weights"].cpu().numpy().copy()
        self.checksum = zlib.crc32(self._current.tobytes())

    def _divisors(self, step: int) -> np.ndarray:
        """Returns the sum of the weights of the gradients in each running mean, [2, layers, rank].

        Before the update at `step`; zero without a gradient. After w at the last switch of the
        counterpart, or zero if that reset the mean, f frozen steps and n gradients, the sum is
        beta^(f + n) w + 1 - beta^n.
        """
        # The running means of counterparts are reset, and then frozen.
        num_steps = step - self._last_switched[[FACTOR_B, FACTOR_A]]
        num_frozen = np.minimum(num_steps, self._config.freeze_steps)
        num_gradients = num_steps - num_frozen
        if self._config.reset_moments == "both":
            num_gradients = np.minimum(num_gradients, step - self._last_switched)
        elif self._config.reset_moments == "none" and not self._keeps_moments:
            num_gradients = np.full_like(num_steps, step)
        beta = self._momentum
        kept = beta ** (num_frozen + num_gradients) * self._kept_weights
        weights: np.ndarray = kept + 1 - beta**num_gradients
        return weights

    def _halves(self, orders: np.ndarray, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the order of A's vectors and of B's."""
        return orders[layer, : self._half], orders[layer, self._half :]

    def _decide(self, layer: int) -> None:
        """Decides the order of a layer's next half, if it is not known yet."""
        while any(layer in measured.layers for measured in self._measurements):
            self._read()
        if self._next[layer, 0] < 0:
            # Not measured in time, as when a run resumes with more switches per step.
            self._next[layer] = np.roll(self._current[layer], self._half)

    def _read(self) -> None:
        """Decides orders by the oldest measurement; the host waits for it."""
        measured = self._measurements.popleft()
        layers, half = measured.layers, self._half
        copied = measured.movement.wait()
        # Fake tensors have no values.
        values = np.zeros(copied.shape) if is_fake(copied) else copied.double().numpy()
        movement = np.full(values.shape, _MOVING)
        np.divide(values, measured.divisors, out=movement, where=measured.divisors > 0)
        movement = np.nan_to_num(movement, nan=_MOVING)[:, layers]
        switched_a, switched_b = np.split(self._current[layers], [half], axis=1)
        for columns, factor, pairs in (
            (slice(0, half), FACTOR_A, switched_b),
            (slice(half, None), FACTOR_B, switched_a),
        ):
            of_pairs = np.take_along_axis(movement[factor], pairs, axis=1)
            places = least_first(of_pairs, self._half - self.window)
            self._next[layers, columns] = np.take_along_axis(pairs, places, axis=1)


def least_first(values: np.ndarray, most_earlier: int) -> np.ndarray:
    """Sorts rows, with each entry at most some places before its own. Equal ones keep their order.

    Args:
        values: [rows, n], finite.
        most_earlier: the places by which an entry may come earlier.

    Returns:
        [rows, n], the place in `values` of each entry of the result.
    """
    num_rows, num_places = values.shape
    left = values.copy()
    order = np.empty((num_rows, num_places), dtype=np.int64)
    for place in range(num_places):
        # Of the first n + 1 entries at least one is left at place n.
        chosen = left[:, : place + most_earlier + 1].argmin(axis=1)
        order[:, place] = chosen
        left[np.arange(num_rows), chosen] = np.inf
    return order


def _spans(vectors: list[int]) -> Spans:
    """Returns vectors in their order, neighbours together."""
    spans: list[range] = []
    for vector in vectors:
        if spans and spans[-1].stop == vector:
            spans[-1] = range(spans[-1].start, vector + 1)
        else:
            spans.append(range(vector, vector + 1))
    return tuple(spans)

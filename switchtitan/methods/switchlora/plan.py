"""The section of SwitchLoRA, and its plan: which vectors are switched, frozen and reset at which
step, in integers that are the same on every rank."""

import logging
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from switchtitan.distributed.rows import Spans
from switchtitan.methods.adapter.method import AdapterConfig

logger = logging.getLogger(__name__)

_GOLDEN_RATIO = (1 + 5**0.5) / 2

FACTOR_A, FACTOR_B = 0, 1
"""Indices of A and B in tables [2, layers, rank]. Vectors i of A and of B are counterparts."""


class SwitchLoraConfig(AdapterConfig):
    """`[method] name = "switchlora"`: LoRA whose vectors are replaced during training (SwitchLoRA,
    arXiv 2406.06564). A switch puts a candidate in place of a vector of A or B and adds the
    difference to the frozen weight, so the layer's output does not change."""

    resumable_keys: ClassVar[frozenset[str]] = AdapterConfig.resumable_keys | {"candidates_device"}
    trains_bf16: ClassVar[bool] = True
    optimizers: ClassVar[frozenset[str] | None] = frozenset(
        {"adamw", "adamw8bit", "muon", "muon8bit"}
    )
    name: Literal["switchlora"] = "switchlora"
    """The method."""
    init: Literal["switchlora", "lora"] = "switchlora"
    """Initial values of factors and candidates: `switchlora` balances the gradients of both factors
    (the paper's initial standard deviations); `lora` draws A at random and sets B and its
    candidates to zero."""
    candidates: Literal["swap", "constant"] = "swap"
    """What happens to a vector that is switched out: `swap` stores it as a candidate, which returns
    later as trained; `constant` drops it and draws the initial candidates again when needed, which
    takes no memory."""
    candidates_device: Literal["device", "host"] = "device"
    """Where candidates are stored: `host` frees GPU memory. No effect on a CPU. Only with swap."""
    interval: float = Field(default=40, gt=0)
    """Mean number of steps between two switches of one vector at the start of training. At least
    2 and 2 * freeze_steps; for an odd rank, rank / (rank // 2) instead of 2. Not with
    switches_per_vector."""
    switches_per_vector: float | None = Field(default=None, gt=0)
    """Mean number of switches of each vector in a run of training.steps, instead of interval, which
    then follows from it, decay and decay_ratio, so that a longer run switches as often. A run that
    resumes with other training.steps switches at their frequency from then on; set interval if runs
    of several lengths resume from one. Default: interval decides."""
    decay: Literal["exponential", "sigmoid", "constant"] = "exponential"
    """How the switching frequency falls during training; `constant` does not change it."""
    decay_ratio: float = Field(default=0.1, gt=0, le=1)
    """Fraction of the run, in (0, 1], after which the frequency has fallen to 0.3 (exponential) or
    0.5 (sigmoid) of its initial value. Not with constant."""
    freeze_steps: int = Field(default=5, ge=0)
    """Steps for which the counterpart of a switched vector gets no update; at least 0. With 0, it
    is updated once by the gradient of before the switch."""
    reset_moments: Literal["counterpart", "momentum", "both", "none"] = "counterpart"
    """Which optimizer state a switch resets, step counts included: that of the `counterpart` (the
    paired vector in the other factor), of `both` vectors, or `none`. `momentum` resets only the
    counterpart's first moment, so that its next updates are small instead of large. With muon, it
    does the same as `counterpart`."""

    @model_validator(mode="after")
    def _check_switching(self) -> "SwitchLoraConfig":
        if self.rank == 1:
            raise ValueError("rank = 1 never switches; use at least 2")
        # A saved configuration has both, with the default interval.
        if self.switches_per_vector is not None and not self.is_default("interval"):
            raise ValueError(
                f"interval = {self.interval:g} and switches_per_vector = "
                f"{self.switches_per_vector:g} both say how often vectors are switched; remove "
                'one, or write switches_per_vector = "none"'
            )
        return self

    def without_effect(self) -> list[str]:
        void = super().without_effect()
        for key, by in (("decay_ratio", "decay"), ("candidates_device", "candidates")):
            if getattr(self, by) == "constant" and not self.is_default(key):
                void.append(f'{key} = {getattr(self, key)!r} has no effect with {by} = "constant"')
        return void

    @property
    def is_balanced(self) -> bool:
        return self.init == "switchlora"

    def depends_on_length(self) -> bool:
        return self.decay != "constant" or self.switches_per_vector is not None

    def rates(self, num_steps: int) -> np.ndarray:
        """Returns the factor on the switching frequency at every step, [num_steps]."""
        t, horizon = np.arange(num_steps, dtype=np.float64), self.decay_ratio * num_steps
        if self.decay == "exponential":
            return 0.3 ** ((t + 1) / horizon)
        if self.decay == "sigmoid":
            return 1 - 1 / (1 + np.exp(-10 * (t / horizon - 1)))
        return np.ones(num_steps)

    def interval_in(self, num_steps: int) -> float:
        """Returns `interval`, or the one that follows from `switches_per_vector`: each vector is
        switched (sum of rates) / interval times in a run."""
        if self.switches_per_vector is None:
            return self.interval
        return float(self.rates(num_steps).sum()) / self.switches_per_vector

    def check_length(self, num_steps: int) -> list[str]:
        least = max(self.freeze_steps, 1) * self.rank / (self.rank // 2)
        interval = self.interval_in(num_steps)
        # The limit as the message prints it, in six digits, is accepted.
        if interval >= least * (1 - 1e-5):
            return []
        or_lower = " or lower freeze_steps" if self.freeze_steps > 1 else ""
        return [
            f"[method] {self.frequency()}: a vector would be switched every {interval:.4g} steps "
            f"at the start, but rank = {self.rank} and freeze_steps = {self.freeze_steps} need at "
            f"least {least:g}, or switches are dropped; switch less often{or_lower}"
        ]

    def frequency(self) -> str:
        """Returns the key that says how often vectors are switched, with its value."""
        key = "interval" if self.switches_per_vector is None else "switches_per_vector"
        return f"{key} = {getattr(self, key):g}"


VectorSpan = tuple[int, range]
"""(factor, vectors): the index of a factor in a flattened table [2, layers, ...], and consecutive
vectors of it."""


class Switch(NamedTuple):
    """The switch of one layer in one step: equally many vectors of A and of B."""

    layer: int
    num_vectors: int
    """Of each factor."""
    vectors: tuple[Spans, Spans]
    """Rows of A and rows of B to exchange. They are disjoint."""
    slots_in: Spans
    """Candidates taken, for each factor."""
    slots_out: Spans
    """Candidates overwritten by the outgoing vectors, for each factor: those that they were."""


class Plan:
    """The schedule of all layers, and the history that later switches follow from.

    With Q the running sum of the expectation, rank * rate(t) / interval, a layer switches
    floor(Q(t) + phase) - floor(Q(t-1) + phase) vectors of each factor (the authors' code draws the
    fraction at random). Phases are a low-discrepancy sequence: layers switch at different steps.

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
        self.config, self.num_candidates = config, num_candidates
        rank, interval = config.rank, config.interval_in(num_steps)
        # Not an error: ranks near the smaller dimension of a layer need very large intervals.
        if rank / interval * (1 - 1e-9) > num_candidates.min() - rank:
            logger.warning(
                f"[method] {config.frequency()}: {rank / interval:.3g} switches of each factor's "
                "vectors are due in a step at the start, but the smallest layer has "
                f"{num_candidates.min()} candidates for rank = {rank}, so some are dropped; switch "
                "less often, or lower rank"
            )
        # rank * (sum of rates) / interval, in this order: exact where the quotient is an integer.
        running_sum = rank * np.cumsum(config.rates(num_steps))
        self._running_sum = np.concatenate([[0.0], running_sum / interval])
        # i + 0.5 keeps phases away from 0 and 1, where rounding of the sum could delay a switch.
        self._phase = (np.arange(len(num_candidates)) + 0.5) / _GOLDEN_RATIO % 1.0
        self.step = 0
        self.num_switched = np.zeros(len(num_candidates), dtype=np.int64)
        shape = 2, len(num_candidates), rank
        # So long ago that nothing is frozen or reset.
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
        rank = self.config.rank
        # The last m vectors of A that were switched froze those of B. The next k of B begin half a
        # ring after the next of A, so they are others if k <= rank // 2 - m; and the same for A.
        froze = self.step - self.last_switched[FACTOR_A] < self.config.freeze_steps
        allowed = np.minimum(rank // 2 - froze.sum(1), self.num_candidates - rank)
        return np.clip(requested, 0, np.maximum(allowed, 0))

    def switch(self, layer: int, count: int) -> Switch:
        """Returns the switch of the next `count` vectors of each factor of a layer.

        The n-th of a run exchanges vector n of A, vector n + rank // 2 of B, and candidate n of
        each, modulo their numbers.
        """
        rank, candidates = self.config.rank, int(self.num_candidates[layer])
        first = int(self.num_switched[layer])
        return Switch(
            layer,
            count,
            vectors=(ring_spans(first, count, rank), ring_spans(rank // 2 + first, count, rank)),
            slots_in=ring_spans(first, count, candidates),
            slots_out=ring_spans(first - rank, count, candidates),
        )

    def advance(self, switches: list[Switch]) -> None:
        """Begins the coming step with these switches; from now on it is the last one."""
        for switch in switches:
            self.num_switched[switch.layer] += switch.num_vectors
            for factor, spans in enumerate(switch.vectors):
                for span in spans:
                    self.last_switched[factor, switch.layer, span.start : span.stop] = self.step
        self.step += 1

    def is_frozen(self) -> np.ndarray:
        """Returns which vectors the last step does not update, [2, layers, rank] bool."""
        counterparts = self.last_switched[::-1]
        return self.step - 1 - counterparts < self.config.freeze_steps

    def steps_since_reset(self) -> np.ndarray:
        """Returns the steps since each vector's state was reset, the last step and those in which
        it was frozen included, [2, layers, rank]. So AdamW's first update after 5 frozen steps is
        about half of lr, not lr."""
        if self.config.reset_moments in ("momentum", "none"):
            return np.full_like(self.last_switched, self.step)
        return self.step - np.maximum(self._last_resets(), 0)

    def resets(self) -> list[VectorSpan]:
        """Returns the vectors whose state the last step's switch resets."""
        if self.config.reset_moments == "none":
            return []
        return vector_spans(self._last_resets() == self.step - 1)

    def _last_resets(self) -> np.ndarray:
        counterparts = self.last_switched[::-1]
        is_both = self.config.reset_moments == "both"
        return np.maximum(counterparts, self.last_switched) if is_both else counterparts

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
    flat = table.reshape(-1, table.shape[2])
    edges = np.diff(np.pad(flat, ((0, 0), (1, 1))).astype(np.int8))
    starts, stops = np.argwhere(edges == 1).tolist(), np.argwhere(edges == -1).tolist()
    return [
        (factor, range(start, stop))
        for (factor, start), (_, stop) in zip(starts, stops, strict=True)
    ]

"""The section `[method] name = "switchlora"`."""

import math
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from switchtitan.config.section import VoidKey, VoidKeyError
from switchtitan.methods.lowrank.config import LowRankConfig

_ROUNDING = 1e-9
"""Relative rounding error allowed in an interval, as computed from switches_per_vector."""


class SwitchLoraConfig(LowRankConfig):
    """`[method] name = "switchlora"`: LoRA whose vectors are replaced during training (SwitchLoRA,
    arXiv 2406.06564). A switch puts a candidate in place of a vector of A or B and adds the
    difference to the frozen weight, so the layer's output does not change."""

    resumable_keys: ClassVar[frozenset[str]] = LowRankConfig.resumable_keys | {"candidates_device"}
    optimizers: ClassVar[frozenset[str] | None] = frozenset({"adamw", "muon"})
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
    then follows from it, decay and decay_ratio, so that a longer run switches as often. Default:
    interval decides."""
    decay: Literal["exponential", "sigmoid", "constant"] = "exponential"
    """How the switching frequency falls during training; `constant` does not change it."""
    decay_ratio: float = Field(default=0.1, gt=0, le=1)
    """Fraction of the run, in (0, 1], after which the frequency has fallen to 0.3 (exponential) or
    0.5 (sigmoid) of its initial value. Not with constant."""
    freeze_steps: int = Field(default=5, ge=0)
    """Steps for which the counterpart of a switched vector gets no update; at least 0."""
    reset_moments: Literal["counterpart", "momentum", "both", "none"] = "counterpart"
    """Which optimizer state a switch resets, step counts included: that of the `counterpart` (the
    paired vector in the other factor), of `both` vectors, or `none`. `momentum` resets only the
    counterpart's first moment, so that its next updates are small instead of large. With
    [optimizer] name = "muon", whose only state is momentum, `momentum` does the same as
    `counterpart`, and next updates have their usual size."""

    @model_validator(mode="after")
    def _check_switching(self) -> "SwitchLoraConfig":
        if self.rank == 1:
            raise ValueError(
                "rank = 1 never switches, since the switched vectors of A and of B must differ; "
                "use at least 2"
            )
        if self.switches_per_vector is not None and "interval" in self.model_fields_set:
            problem = (
                f"interval = {self.interval:g} and switches_per_vector = "
                f"{self.switches_per_vector:g} both say how often vectors are switched; remove one"
            )
            raise VoidKeyError(
                [
                    VoidKey("interval", ("switches_per_vector",), problem),
                    VoidKey("switches_per_vector", ("interval",), problem),
                ]
            )
        if self.decay == "constant" and "decay_ratio" in self.model_fields_set:
            problem = 'decay_ratio has no effect with decay = "constant"; remove it'
            raise VoidKeyError([VoidKey("decay_ratio", ("decay",), problem)])
        if self.candidates == "constant" and "candidates_device" in self.model_fields_set:
            problem = (
                f"candidates_device = {self.candidates_device!r} has no effect with "
                'candidates = "constant", which stores none; remove it or set candidates = "swap"'
            )
            raise VoidKeyError([VoidKey("candidates_device", ("candidates",), problem)])
        return self

    def rates(self, num_steps: int) -> np.ndarray:
        """Returns the factor on the switching frequency at every step, [num_steps].

        "exponential": 0.3^((t+1) / (decay_ratio T))
        "sigmoid": 1 - 1/(1 + exp(-10 (t / (decay_ratio T) - 1)))
        "constant": 1
        """
        t, horizon = np.arange(num_steps, dtype=np.float64), self.decay_ratio * num_steps
        if self.decay == "exponential":
            return 0.3 ** ((t + 1) / horizon)
        if self.decay == "sigmoid":
            return 1 - 1 / (1 + np.exp(-10 * (t / horizon - 1)))
        return np.ones(num_steps)

    def interval_in(self, num_steps: int) -> float:
        """Returns `interval`, or the one that follows from `switches_per_vector`.

        Each vector is switched (sum of rates) / interval times in a run of `num_steps` steps.
        """
        if self.switches_per_vector is None:
            return self.interval
        return float(self.rates(num_steps).sum()) / self.switches_per_vector

    def check_length(self, num_steps: int) -> list[str]:
        """See `contracts.MethodConfig`."""
        # Not refused by the section itself: saved runs can still be evaluated and exported.
        least = max(self.freeze_steps, 1) * self.rank / (self.rank // 2)
        interval = self.interval_in(num_steps)
        if interval >= least * (1 - _ROUNDING):
            return []
        # Rounded so that the numbers of the message are accepted.
        key, remedy = f"interval = {interval:g}", "increase interval"
        if self.switches_per_vector is not None:
            key = f"switches_per_vector = {self.switches_per_vector:g} in {num_steps} steps"
            most = 0.995 * self.switches_per_vector * interval / least
            remedy = f"use at most {most:.3g}, increase [training] steps,"
        least = math.ceil(least * 100 * (1 - _ROUNDING)) / 100
        return [
            f"[method] {key}: a vector would be switched every {interval:.4g} steps at the start, "
            f"but rank = {self.rank} and freeze_steps = {self.freeze_steps} need at least "
            f"{least:g}, so that no frozen vector is switched; {remedy} or lower freeze_steps"
        ]

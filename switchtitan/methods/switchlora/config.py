"""The section `[method] name = "switchlora"`."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from switchtitan.methods.lowrank.config import LowRankConfig


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
        """See `registry.Section`."""
        void = super().without_effect()
        for key, by in (("decay_ratio", "decay"), ("candidates_device", "candidates")):
            if getattr(self, by) == "constant" and not self.is_default(key):
                void.append(f'{key} = {getattr(self, key)!r} has no effect with {by} = "constant"')
        return void

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
        """Returns `interval`, or the one that follows from `switches_per_vector`: each vector is
        switched (sum of rates) / interval times in a run."""
        if self.switches_per_vector is None:
            return self.interval
        return float(self.rates(num_steps).sum()) / self.switches_per_vector

    def check_length(self, num_steps: int) -> list[str]:
        """See `contracts.MethodConfig`."""
        least = max(self.freeze_steps, 1) * self.rank / (self.rank // 2)
        interval = self.interval_in(num_steps)
        # The message shows six digits of the limit.
        if interval >= least * (1 - 1e-5):
            return []
        return [
            f"[method] {self.frequency()}: a vector would be switched every {interval:.4g} steps "
            f"at the start, but rank = {self.rank} and freeze_steps = {self.freeze_steps} need at "
            f"least {least:g}, so that no frozen vector is switched; switch less often or lower "
            "freeze_steps"
        ]

    def frequency(self) -> str:
        """Returns the key that says how often vectors are switched, with its value."""
        if self.switches_per_vector is None:
            return f"interval = {self.interval:g}"
        return f"switches_per_vector = {self.switches_per_vector:g}"

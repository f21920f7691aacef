"""The section `[method] name = "switchlora"`."""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from switchtitan.config.section import VoidKey, VoidKeyError
from switchtitan.contracts import OptimizerConfig
from switchtitan.methods.lowrank.config import LowRankConfig
from switchtitan.methods.switchlora.rate import Decay, switch_rate

PRESETS: Mapping[str, Mapping[str, object]] = {
    "gentle": {
        "candidates": "constant",
        "switches_per_vector": 9.4,
        "decay": "constant",
        "freeze_steps": 0,
        "reset_moments": "momentum",
    }
}
"""Name -> the keys that it sets. docs/RESULTS.md compares `gentle` with the published keys."""
_ROUNDING = 1e-9
"""Relative rounding error allowed in an interval, as computed from switches_per_vector."""
_DOWN = 0.995
"""Factor that keeps a limit printed with three digits below the exact limit."""


class SwitchLoraConfig(LowRankConfig):
    """`[method] name = "switchlora"`: LoRA whose vectors are replaced during training (SwitchLoRA,
    arXiv 2406.06564). A switch puts a candidate in place of a vector of A or B and adds the
    difference to the frozen weight, so the layer's output does not change. Moments of A and B are
    in fp32 with every `[optimizer] moments_dtype`."""

    resumable_keys: ClassVar[frozenset[str]] = LowRankConfig.resumable_keys | {"candidates_device"}
    optimizers: ClassVar[frozenset[str] | None] = frozenset({"adamw", "muon"})
    name: Literal["switchlora"] = "switchlora"
    """The method."""
    preset: Literal["gentle"] | None = None
    """Name of a group of values: `gentle` sets candidates = "constant", switches_per_vector = 9.4
    (unless interval is set), decay = "constant", freeze_steps = 0 and reset_moments = "momentum"
    (compared in docs/RESULTS.md). Keys that are set by themselves win. The saved configuration has
    these keys, and no preset. Default: none, the published keys."""
    init: Literal["switchlora", "lora"] = "switchlora"
    """Initial values of factors and candidates: `switchlora` balances the gradients of both factors
    (the paper's initial standard deviations); `lora` draws A at random and sets B and its
    candidates to zero."""
    candidates: Literal["swap", "constant"] = "swap"
    """What happens to a vector that is switched out: `swap` stores it as a candidate, which returns
    later as trained; `constant` drops it and draws the initial candidates again when needed, which
    takes no memory."""
    candidates_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of stored candidates: `bfloat16` takes half the memory and rounds stored vectors to
    nearest. A switch keeps the layer's output with either. Only with swap."""
    candidates_device: Literal["device", "host"] = "device"
    """Where candidates are stored: `host` frees GPU memory and prefetches one step ahead. No effect
    on a CPU. Only with swap."""
    interval: float = Field(default=40, gt=0)
    """Mean number of steps between two switches of one vector at the start of training. At least
    2 and 2 * freeze_steps; for an odd rank, rank / (rank // 2) instead of 2. Not with
    switches_per_vector."""
    switches_per_vector: float | None = Field(default=None, gt=0)
    """Mean number of switches of each vector in a run of training.steps, instead of interval, which
    then follows from it, decay and decay_ratio, so that a longer run switches as often. Default:
    interval decides."""
    decay: Decay = "exponential"
    """How the switching frequency falls during training; `constant` does not change it."""
    decay_ratio: float = Field(default=0.1, gt=0, le=1)
    """Fraction of the run, in (0, 1], after which the frequency has fallen to 0.3 (exponential) or
    0.5 (sigmoid) of its initial value. Not with constant."""
    order: Literal["ring", "least_moving"] = "ring"
    """Which vectors of a layer are switched first. Each is switched equally often with either:
    `ring` takes them in turn; `least_moving` takes first those whose gradients cancel out over
    time. It needs an even rank of at least 4 and an interval of at least 4 * freeze_steps and 4."""
    freeze_steps: int = Field(default=5, ge=0)
    """Steps for which the counterpart of a switched vector gets no update; at least 0."""
    reset_moments: Literal["counterpart", "momentum", "rescaled", "both", "none"] = "counterpart"
    """Which optimizer state a switch resets, step counts included: that of the `counterpart` (the
    paired vector in the other factor), of `both` vectors, or `none`. `momentum` resets only the
    counterpart's first moment, so that its next updates are small instead of large. `rescaled` does
    that and multiplies its second moment by |new|^2 / |old|^2 of the switched vector, since its
    gradient is proportional to that vector; if either norm is zero, the counterpart is reset. With
    [optimizer] name = "muon", whose only state is momentum, `momentum` does the same as
    `counterpart`, next updates have their usual size, and `rescaled` is an error."""

    @classmethod
    def implied_by(cls, key: str, value: object) -> Mapping[str, object]:
        """See `Section.implied_by`."""
        if key != "preset" or not isinstance(value, str) or value not in PRESETS:
            return {}
        # A file's interval would take the place of switches_per_vector.
        return {**PRESETS[value], "interval": None}

    @model_validator(mode="after")
    def _expand_preset(self) -> "SwitchLoraConfig":
        """Replaces `preset` by its keys."""
        # Not with mode="before": pydantic then rejects the lists of a file, which are no tuples.
        if self.preset is None:
            return self
        given = self.model_fields_set
        keys = {key: value for key, value in PRESETS[self.preset].items() if key not in given}
        if "interval" in given:
            keys.pop("switches_per_vector", None)
        self.__dict__.update(keys, preset=None)
        given.update(keys)
        return self

    @model_validator(mode="after")
    def _check_switching(self) -> "SwitchLoraConfig":
        if self.rank == 1:
            raise ValueError(
                "rank = 1 never switches, since the switched vectors of A and of B must differ; "
                "use at least 2"
            )
        if self.order == "least_moving" and (self.rank % 2 or self.rank < 4):
            raise ValueError(
                f"order = 'least_moving' needs an even rank of at least 4, not {self.rank}: halves "
                "of the vectors take turns; use another rank, or order = 'ring'"
            )
        if self.switches_per_vector is not None:
            self._check_interval_is_unset()
        elif self.order == "least_moving" and self.interval < self._least_interval():
            raise ValueError(
                f"interval = {self.interval:g}: order = 'least_moving' needs at least 4 and "
                f"4 * freeze_steps = {4 * self.freeze_steps}, so that enough vectors are not "
                "frozen; increase interval, lower freeze_steps, or set order = 'ring'"
            )
        elif self.interval < 2 * self.freeze_steps:
            raise ValueError(
                f"interval = {self.interval:g} is below 2 * freeze_steps = "
                f"{2 * self.freeze_steps}: vectors would be switched while frozen; "
                "increase interval or lower freeze_steps"
            )
        if self.decay == "constant" and "decay_ratio" in self.model_fields_set:
            problem = 'decay_ratio has no effect with decay = "constant"; remove it'
            raise VoidKeyError([VoidKey("decay_ratio", ("decay", "preset"), problem)])
        for key in ("candidates_dtype", "candidates_device"):
            if self.candidates == "constant" and key in self.model_fields_set:
                problem = (
                    f"{key} = {getattr(self, key)!r} has no effect with "
                    'candidates = "constant", '
                    'which stores none; remove it or set candidates = "swap"'
                )
                raise VoidKeyError([VoidKey(key, ("candidates", "preset"), problem)])
        return self

    def _check_interval_is_unset(self) -> None:
        if "interval" not in self.model_fields_set:
            return
        problem = (
            f"interval = {self.interval:g} and switches_per_vector = {self.switches_per_vector:g} "
            "both say how often vectors are switched; remove one of the two"
        )
        raise VoidKeyError(
            [
                VoidKey("interval", ("switches_per_vector",), problem),
                VoidKey("switches_per_vector", ("interval",), problem),
            ]
        )

    def interval_in(self, num_steps: int) -> float:
        """Returns `interval`, or the one that follows from `switches_per_vector`.

        Each vector is switched (sum of rates) / interval times in a run of `num_steps` steps.
        """
        if self.switches_per_vector is None:
            return self.interval
        return self._sum_of_rates(num_steps) / self.switches_per_vector

    def check_length(self, num_steps: int) -> list[str]:
        """See `contracts.MethodConfig`."""
        least = self._least_interval()
        interval = self.interval_in(num_steps)
        if interval >= least * (1 - _ROUNDING):
            return []
        if self.switches_per_vector is None:
            # Not refused by the section itself: saved runs can still be evaluated and exported.
            has_span = self.freeze_steps > 1
            return [
                f"[method] interval = {interval:g}: expected at least {_rounded_up(least)}, since "
                f"rank = {self.rank} and freeze_steps = {self.freeze_steps} allow "
                f"{self.rank // 2} switches of each factor's vectors in "
                f"{f'{self.freeze_steps} steps' if has_span else 'one step'}; increase interval"
                f"{' or lower freeze_steps' if has_span else ''}"
            ]
        limit = self._sum_of_rates(num_steps) / least
        return [
            f"[method] switches_per_vector = {self.switches_per_vector:g}: a run of [training] "
            f"steps = {num_steps} would switch a vector every {interval:.3g} steps at its start, "
            f"but rank = {self.rank} and freeze_steps = {self.freeze_steps} need at least "
            f"{least:.3g}; use at most {_DOWN * limit:.3g}, increase steps, or lower freeze_steps"
        ]

    def check_optimizer(self, optimizer: OptimizerConfig) -> list[str]:
        """See `contracts.MethodConfig`."""
        if self.reset_moments != "rescaled" or optimizer.name != "muon":
            return []
        return [
            '[method] reset_moments = "rescaled": [optimizer] name = "muon" has no second moments '
            'to rescale; set reset_moments to "counterpart", "momentum", "both" or "none", or name '
            'to "adamw"'
        ]

    def _least_interval(self) -> float:
        """Returns the interval below which `SwitchCounts.limited` could drop switches: in each span
        of freeze_steps steps, at least one, it allows a half of the vectors, or a quarter."""
        part = self.rank // 2 / self.rank if self.order == "ring" else 1 / 4
        return max(self.freeze_steps, 1) / part

    def _sum_of_rates(self, num_steps: int) -> float:
        return float(switch_rate(self.decay, self.decay_ratio, num_steps).sum())


def _rounded_up(limit: float) -> str:
    """Returns a limit with at most two decimals that is not below it, up to rounding."""
    return f"{math.ceil(limit * (1 - _ROUNDING) * 100) / 100:g}"

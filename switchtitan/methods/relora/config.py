"""The section `[method] name = "relora"`."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from switchtitan.methods.lowrank.config import LowRankConfig


class ReloraConfig(LowRankConfig):
    """`[method] name = "relora"`: ReLoRA (arXiv 2307.05695); the paper starts it from a model that was trained at full rank for
    a while, see `[checkpoint] initial_weights`."""

    name: Literal["relora"] = "relora"
    """The method."""
    optimizers: ClassVar[frozenset[str] | None] = frozenset({"adamw"})
    reset_interval: int = Field(ge=1)
    """Optimizer steps between two resets, above restart_warmup_steps and below training.steps. A reset merges every layer's
    factors into its weight and starts them anew; none happens at the very end of the run."""
    restart_warmup_steps: int = Field(default=100, ge=0)
    """Steps over which all learning rates rise linearly from 0 at a reset back to what the schedule gives; the paper has 50 to
    100, and 0 does without."""
    reset_moments: Literal["magnitude", "random", "zero"] = "magnitude"
    """What a reset leaves of the factors' optimizer state: `magnitude` the largest values of each moment (a first moment only
    beside its second), `random` values drawn by lot, `zero` nothing, step counts included."""
    prune_ratio: float = Field(default=0.9, gt=0, lt=1)
    """The share, in (0, 1), of the values of each moment that a reset zeroes. Has no effect with zero."""

    def check_length(self, num_steps: int) -> list[str]:
        """What is wrong between this section and a run of so many steps."""
        if self.reset_interval < num_steps:
            return []
        return [
            f"[method] reset_interval = {self.reset_interval}: expected less than [training] steps = {num_steps}, since a run "
            'that never resets is plain LoRA; lower it, raise steps, or choose name = "lora"'
        ]

    @model_validator(mode="after")
    def _check_resets(self) -> "ReloraConfig":
        if self.restart_warmup_steps >= self.reset_interval:
            raise ValueError(
                f"restart_warmup_steps = {self.restart_warmup_steps} is not below reset_interval = {self.reset_interval}: the "
                "learning rate would never come back to its schedule; lower it or raise reset_interval"
            )
        if self.reset_moments == "zero" and "prune_ratio" in self.model_fields_set:
            raise ValueError('prune_ratio has no effect with reset_moments = "zero"; remove it')
        return self

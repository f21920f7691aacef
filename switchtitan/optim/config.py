"""Sections of the optimizer and of the learning-rate schedule."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from switchtitan.config.section import Section
from switchtitan.contracts import OptimizerConfig


class AdamWConfig(OptimizerConfig):
    """`[optimizer] name = "adamw"`: AdamW (arXiv 1711.05101)."""

    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment, each in [0, 1)."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment, above 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, at least 0; times the learning rate, per step."""

    @field_validator("betas")
    @classmethod
    def _check_betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("each must lie in [0, 1)")
        return betas


class LRScheduleConfig(Section):
    """`[lr_schedule]`: the learning rate as a factor of its peak."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the factor rises linearly from 1 / warmup_steps to 1; a shorter run ends within them."""
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    """How the factor falls from 1 to `min_factor` over the rest of the run."""
    min_factor: float = Field(default=0.1, ge=0, le=1)
    """The factor at the end of the run, in [0, 1]. A constant schedule has none."""

    @model_validator(mode="after")
    def _check_min_factor(self) -> "LRScheduleConfig":
        if self.decay == "constant" and "min_factor" in self.model_fields_set:
            raise ValueError('min_factor has no effect with decay = "constant"; remove it')
        return self

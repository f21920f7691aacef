"""AdamW."""

from collections.abc import Iterable
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from switchtitan.contracts import OptimizerConfig
from switchtitan.optim.parameters import TrainedParameter
from switchtitan.optim.torch_optimizer import TorchOptimizer

_Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamKeys(OptimizerConfig):
    """The configuration keys of Adam's rule."""

    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    """Decay rates of the first and second moment, each in [0, 1)."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the square root of the second moment; above 0."""


class AdamWConfig(AdamKeys):
    """`[optimizer] name = "adamw"`: AdamW (arXiv 1711.05101). Weight decay is decoupled, and scaled
    by the learning rate."""

    width_exponent: ClassVar[float] = 1.0
    name: Literal["adamw"] = "adamw"
    """The optimizer."""


class AdamW(TorchOptimizer):
    """`torch.optim.AdamW` on local shards, by torch's fused kernels.

    Its state is `<parameter>.exp_avg`, `.exp_avg_sq` (like the parameter) and `.step` (0-dim).
    `compile_step` has no effect, since torch's kernels are fused already.
    """

    def __init__(
        self, config: AdamKeys, parameters: Iterable[TrainedParameter], compile_step: bool = False
    ) -> None:
        build = partial(torch.optim.AdamW, betas=config.betas, eps=config.eps, fused=True)
        super().__init__(config, parameters, build, _initial_state)


def _initial_state(like: Tensor) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), device=like.device),
        "exp_avg": torch.zeros_like(like),
        "exp_avg_sq": torch.zeros_like(like),
    }

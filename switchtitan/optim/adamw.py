"""AdamW on local shards."""

from collections.abc import Iterable
from functools import partial
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch.optim.adamw import adamw

from switchtitan.contracts import OptimizerConfig, TrainingOptimizer
from switchtitan.distributed.shards import local
from switchtitan.errors import ConfigError
from switchtitan.optim.base import GroupedOptimizer
from switchtitan.optim.parameters import TrainedParameter


class AdamKeys(OptimizerConfig):
    """The configuration keys of Adam's rule."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment, each in [0, 1)."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the square root of the second moment; above 0."""

    @field_validator("betas")
    @classmethod
    def _check_betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("each must lie in [0, 1)")
        return betas


class AdamWConfig(AdamKeys):
    """`[optimizer] name = "adamw"`: AdamW (arXiv 1711.05101). Weight decay is decoupled, and scaled
    by the learning rate."""

    name: Literal["adamw"] = "adamw"
    """The optimizer."""


def require_adamw(config: OptimizerConfig) -> AdamWConfig:
    """Returns the configuration of AdamW, for a method that uses a variant of AdamW.

    Raises:
        ConfigError: if another optimizer is chosen.
    """
    if not isinstance(config, AdamWConfig):
        raise ConfigError(f'[optimizer] name = {config.name!r}: expected "adamw"')
    return config


class AdamW(GroupedOptimizer):
    """torch's AdamW on the local shards of parameters.

    The update is torch's function, fused or compiled. Not torch's class, which steps through
    DTensor's dispatcher and does not compile to one graph. Its state is `<parameter>.exp_avg`,
    `.exp_avg_sq` (like the parameter) and `.step` (0-dim).

    Args:
        parameters: the parameters to train, fp32.
        compile_step: compile the update. Without it, torch's fused kernel updates few tensors in
            one pass.
    """

    def __init__(
        self,
        config: AdamKeys,
        parameters: Iterable[TrainedParameter],
        compile_step: bool = False,
    ) -> None:
        super().__init__(config, parameters, rates_as_tensors=compile_step)
        for name, parameter in self.parameters.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                self.state[f"{name}.{moment}"] = torch.zeros_like(parameter, requires_grad=False)
            self.state[f"{name}.step"] = torch.zeros((), device=parameter.device)
        self._update = _build_update(config, compile_step)

    @torch.no_grad()
    def step(self) -> None:
        for group, lr in zip(self.groups, self.rates, strict=True):
            updated = {
                name: (local(parameter), local(parameter.grad))
                for name, parameter in group.parameters.items()
                if parameter.grad is not None
            }
            if updated:
                parameters, grads = zip(*updated.values(), strict=True)
                self._update(
                    list(parameters),
                    list(grads),
                    [local(self.state[f"{name}.exp_avg"]) for name in updated],
                    [local(self.state[f"{name}.exp_avg_sq"]) for name in updated],
                    [],  # the maximum second moments of AMSGrad
                    [self.state[f"{name}.step"] for name in updated],
                    lr=lr,
                    weight_decay=group.weight_decay,
                )


def build_adamw(
    config: AdamWConfig, parameters: Iterable[TrainedParameter], compile_step: bool, seed: int
) -> TrainingOptimizer:
    return AdamW(config, parameters, compile_step)


def _build_update(config: AdamKeys, compile_step: bool) -> partial[None]:
    update = partial(
        adamw,
        foreach=compile_step,
        capturable=compile_step,
        fused=not compile_step,
        differentiable=False,
        amsgrad=False,
        maximize=False,
        beta1=config.betas[0],
        beta2=config.betas[1],
        eps=config.eps,
    )
    if not compile_step:
        return update
    return partial(torch.compile(update.func, fullgraph=True, dynamic=False), **update.keywords)

"""AdamW on local shards."""

from collections.abc import Iterable
from functools import partial
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.optim.adamw import adamw

from switchtitan.contracts import OptimizerConfig
from switchtitan.distributed.shards import local
from switchtitan.errors import ConfigError
from switchtitan.optim.parameters import (
    LearningRates,
    ParameterGroup,
    TrainedParameter,
    lr_metrics,
    parameter_groups,
    parameters_of,
)
from switchtitan.optim.rounded_moments import RoundedUpdate


class AdamBetas(OptimizerConfig):
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


class AdamKeys(AdamBetas):
    """The configuration keys of Adam's rule and of its moments."""

    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype in which AdamW stores the moments of the parameters that it updates. `bfloat16` halves
    them: updates are computed in fp32, and moments are rounded stochastically, which is unbiased
    and does not depend on the number of ranks; compile the optimizer, since the update takes many
    kernels otherwise. A method or optimizer with its own rule for some parameters keeps their
    moments in fp32, as its section says; the key then applies to all other parameters."""


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


class AdamW:
    """torch's AdamW on the local shards of parameters; a `contracts.TrainingOptimizer`.

    With moments in fp32 the update is torch's function, fused or compiled. Not torch's class, which
    steps through DTensor's dispatcher and does not compile to one graph. For moments in bf16 see
    `RoundedUpdate`.

    Args:
        parameters: the parameters to train, fp32.
        compile_step: compile the update.
        seed: the job's seed, for the rounding of moments in bf16.
    """

    def __init__(
        self,
        config: AdamKeys,
        parameters: Iterable[TrainedParameter],
        compile_step: bool = False,
        seed: int = 0,
    ) -> None:
        self._config, self._lr_factor = config, 1.0
        self._groups = parameter_groups(config, parameters)
        self._parameters = parameters_of(self._groups)
        is_rounded = config.moments_dtype == "bfloat16"
        dtype = torch.bfloat16 if is_rounded else None
        self._exp_avg = {
            name: _zeros_like(parameter, dtype) for name, parameter in self._parameters.items()
        }
        self._exp_avg_sq = {
            name: _zeros_like(parameter, dtype) for name, parameter in self._parameters.items()
        }
        self._num_steps = {
            name: torch.zeros((), device=parameter.device)
            for name, parameter in self._parameters.items()
        }
        self._lrs = LearningRates(self._groups, as_tensors=compile_step)
        self._update = _build_update(config, compile_step)
        self._rounded_update = (
            RoundedUpdate(self._parameters, config.betas, config.eps, seed, compile_step)
            if is_rounded
            else None
        )

    @torch.no_grad()
    def step(self) -> None:
        """Updates every parameter that has a gradient."""
        for group, lr in zip(self._groups, self._lrs, strict=True):
            self._update_group(group, lr)

    def _update_group(self, group: ParameterGroup, lr: Tensor | float) -> None:
        names = [name for name, parameter in group.parameters.items() if parameter.grad is not None]
        if not names:
            return
        parameters = [local(self._parameters[name]) for name in names]
        grads = [local(self._parameters[name].grad) for name in names]  # type: ignore[arg-type]
        exp_avgs = [local(self._exp_avg[name]) for name in names]
        exp_avg_sqs = [local(self._exp_avg_sq[name]) for name in names]
        num_steps = [self._num_steps[name] for name in names]
        if self._rounded_update is None:
            self._update(
                parameters,
                grads,
                exp_avgs,
                exp_avg_sqs,
                [],  # the maximum second moments of AMSGrad
                num_steps,
                lr=lr,
                weight_decay=group.weight_decay,
            )
            return
        torch._foreach_add_(num_steps, 1)
        for index, name in enumerate(names):
            self._rounded_update(
                name,
                parameters[index],
                grads[index],
                exp_avgs[index],
                exp_avg_sqs[index],
                num_steps[index],
                lr,
                group.weight_decay,
            )

    def zero_grad(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def set_lr(self, lr_factor: float) -> None:
        self._lr_factor = lr_factor
        self._lrs.set_factor(lr_factor)

    def metrics(self) -> dict[str, float]:
        return lr_metrics(self._config, self._lr_factor)

    def replicated(self) -> dict[str, Tensor]:
        """Returns the keys that round moments in bf16; see `contracts.HoldsReplicated`."""
        return {} if self._rounded_update is None else self._rounded_update.replicated()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns `<parameter>.exp_avg`, `.exp_avg_sq` (like the parameter) and `.step` (0-dim)."""
        moments = {
            "exp_avg": self._exp_avg,
            "exp_avg_sq": self._exp_avg_sq,
            "step": self._num_steps,
        }
        return {
            f"{name}.{key}": tensors[name]
            for name in self._parameters
            for key, tensors in moments.items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for key, tensor in self.state_dict().items():
                tensor.copy_(state[key])


def adamw_for_others(
    config: AdamKeys, parameters: Iterable[TrainedParameter], compile_step: bool, seed: int
) -> AdamW:
    """Returns AdamW for the few parameters that another rule does not update.

    Compiled only if moments are in bf16: torch's fused kernel updates few tensors in one pass.
    """
    return AdamW(config, parameters, compile_step and config.moments_dtype == "bfloat16", seed)


def _zeros_like(parameter: nn.Parameter, dtype: torch.dtype | None) -> Tensor:
    return torch.zeros_like(
        parameter, dtype=dtype, requires_grad=False, memory_format=torch.preserve_format
    )


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

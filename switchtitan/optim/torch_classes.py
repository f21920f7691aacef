"""Optimizers of `torch.optim` that can be chosen by name."""

from collections.abc import Iterable
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from switchtitan.contracts import OptimizerConfig, TrainingOptimizer
from switchtitan.optim.adamw import AdamKeys, AdamW
from switchtitan.optim.parameters import TrainedParameter
from switchtitan.optim.torch_optimizer import FullTensorOptimizer, SplitOptimizer, TorchOptimizer


class SGDConfig(OptimizerConfig):
    """`[optimizer] name = "sgd"`: `torch.optim.SGD`. Weight decay is coupled: weight_decay times the
    weight is added to the gradient."""

    name: Literal["sgd"] = "sgd"
    """The optimizer."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of the running sum of gradients, in [0, 1); 0 keeps none."""
    nesterov: bool = False
    """Nesterov momentum; has no effect with momentum = 0."""

    @model_validator(mode="after")
    def _check_nesterov(self) -> "SGDConfig":
        if self.nesterov and self.momentum == 0:
            raise ValueError(
                "nesterov has no effect with momentum = 0; remove it or increase momentum"
            )
        return self


class AdafactorConfig(OptimizerConfig):
    """`[optimizer] name = "adafactor"`: `torch.optim.Adafactor` (arXiv 1804.04235). Its second moments
    take one number for each row and each column of a matrix. Weight decay is decoupled. A step gathers
    one parameter and its gradient at a time on every rank."""

    name: Literal["adafactor"] = "adafactor"
    """The optimizer."""
    can_compile: ClassVar[bool] = False
    beta2_decay: float = Field(default=-0.8, lt=0)
    """The second moments' decay rate at step t is 1 - t^beta2_decay; below 0."""
    eps: float = Field(default=1e-3, gt=0)
    """Lower bound, above 0, of the root mean square of a parameter, by which its learning rate is multiplied."""
    clip_threshold: float = Field(default=1.0, gt=0)
    """Updates are scaled down to this root mean square, above 0."""


class MuonConfig(AdamKeys):
    """`[optimizer] name = "muon"`: `torch.optim.Muon` for the matrices in the model's blocks, AdamW for
    all other parameters. Both take the same learning rate and decoupled weight decay, since Muon's
    updates are scaled to the root mean square of AdamW's (arXiv 2502.16982). On one rank only, since
    an update needs the full matrix."""

    name: Literal["muon"] = "muon"
    """The optimizer."""
    can_compile: ClassVar[bool] = False
    max_ranks: ClassVar[int | None] = 1
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay rate of the running sum of gradients, in [0, 1)."""
    nesterov: bool = True
    """Nesterov momentum."""
    ns_steps: int = Field(default=5, ge=1)
    """Newton-Schulz iterations that make an update orthogonal, at least 1."""


def build_sgd(
    config: SGDConfig, parameters: Iterable[TrainedParameter], compile_step: bool = False
) -> TrainingOptimizer:
    build = partial(torch.optim.SGD, momentum=config.momentum, nesterov=config.nesterov)
    return TorchOptimizer(config, parameters, build, compile_step)


def build_adafactor(
    config: AdafactorConfig, parameters: Iterable[TrainedParameter], compile_step: bool = False
) -> TrainingOptimizer:
    build = partial(
        torch.optim.Adafactor,
        beta2_decay=config.beta2_decay,
        eps=(None, config.eps),
        d=config.clip_threshold,
    )
    return FullTensorOptimizer(config, parameters, build)


def build_muon(
    config: MuonConfig, parameters: Iterable[TrainedParameter], compile_step: bool = False
) -> TrainingOptimizer:
    parameters = list(parameters)
    matrices = [p for p in parameters if p.is_in_block and p.parameter.ndim == 2]
    others = [p for p in parameters if not (p.is_in_block and p.parameter.ndim == 2)]
    build = partial(
        torch.optim.Muon,
        momentum=config.momentum,
        nesterov=config.nesterov,
        ns_steps=config.ns_steps,
        adjust_lr_fn="match_rms_adamw",
    )
    return SplitOptimizer([TorchOptimizer(config, matrices, build), AdamW(config, others)])

"""An adapter for any `torch.optim.Optimizer`, and the torch optimizers that can be chosen by
name."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from switchtitan.config.section import VoidKey, VoidKeyError
from switchtitan.contracts import OptimizerConfig, TrainingOptimizer
from switchtitan.distributed.shards import copy_from_full_, full_tensor
from switchtitan.optim.base import GroupedOptimizer
from switchtitan.optim.parameters import TrainedParameter

BuildOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Builds an optimizer from parameter groups with `params`, `lr` and `weight_decay`."""


class TorchOptimizer(GroupedOptimizer):
    """Adapts a torch optimizer that steps on the parameters.

    Sharded parameters are DTensors. It is correct on any number of ranks if DTensor supports the
    optimizer's operations. State is saved by parameter name and loads on another number of ranks.

    Torch creates state in the first step. If state is needed earlier, to resume a run, a step with
    zero gradients and a learning rate of zero creates it. The first real step discards that state
    unless `load_state_dict` has filled it in.

    Args:
        build: builds the torch optimizer.
        compile_step: compile the torch optimizer's step.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        parameters: Iterable[TrainedParameter],
        build: BuildOptimizer,
        compile_step: bool = False,
    ) -> None:
        super().__init__(config, parameters)
        self._held = self._tensors_to_hold()
        self._optimizer = build(
            [
                {
                    "params": [self._held[name] for name in group.parameters],
                    # A tensor: torch.compile would recompile for every new Python number.
                    "lr": torch.tensor(group.lr) if compile_step else group.lr,
                    "weight_decay": group.weight_decay,
                }
                for group in self.groups
            ]
        )
        self._step: Callable[[], object] = (
            torch.compile(self._optimizer.step) if compile_step else self._optimizer.step
        )
        self._initial_state: dict[Tensor, dict[str, Any]] | None = None
        self._has_started = False

    def step(self) -> None:
        """Updates every parameter that has a gradient."""
        if self._initial_state is not None:
            self._optimizer.state.clear()
            self._optimizer.state.update(self._initial_state)
            self._initial_state = None
        self._has_started = True
        self._update(self._step)

    def set_lr(self, lr_factor: float) -> None:
        super().set_lr(lr_factor)
        for own, group in zip(self._optimizer.param_groups, self.groups, strict=True):
            if isinstance(own["lr"], Tensor):
                own["lr"].fill_(group.lr * lr_factor)
            else:
                own["lr"] = group.lr * lr_factor

    def state_dict(self) -> dict[str, Tensor]:
        """Returns `<parameter>.<key>` for every tensor and number in the state. All ranks must
        call."""
        self._create_state()
        return {
            f"{name}.{key}": value if isinstance(value, Tensor) else torch.tensor(value)
            for name, held in self._held.items()
            # `state[held]` would add an empty entry, and a compiled step would be compiled again.
            for key, value in self._optimizer.state.get(held, {}).items()
            if value is not None
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._create_state()
        for name, held in self._held.items():
            own = self._optimizer.state.get(held, {})
            for key, value in own.items():
                if isinstance(value, Tensor):
                    value.copy_(state[f"{name}.{key}"])
                elif value is not None:
                    own[key] = type(value)(state[f"{name}.{key}"].item())
        self._initial_state, self._has_started = None, True

    def _tensors_to_hold(self) -> dict[str, nn.Parameter]:
        """Returns the parameters of torch's optimizer, by name."""
        return self.parameters

    def _update(self, step: Callable[[], object]) -> None:
        step()

    def _create_state(self) -> None:
        """Creates the state of torch's optimizer, if there is none."""
        if self._has_started or self._initial_state is not None:
            return
        initial_state = {
            held: {
                key: value.clone() if isinstance(value, Tensor) else value
                for key, value in own.items()
            }
            for held, own in self._optimizer.state.items()
        }
        grads = {name: parameter.grad for name, parameter in self.parameters.items()}
        rates = [group["lr"] for group in self._optimizer.param_groups]
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
        self._update(self._optimizer.step)
        for group, lr in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        for name, parameter in self.parameters.items():
            parameter.grad = grads[name]
        self._initial_state = initial_state


class FullTensorOptimizer(TorchOptimizer):
    """Adapts a torch optimizer that steps on full tensors, because its update is not elementwise.

    Every rank gathers one parameter and its gradient at a time, computes the same update, and keeps
    its local shard. State is unsharded and the same on every rank.
    """

    def _tensors_to_hold(self) -> dict[str, nn.Parameter]:
        return {
            name: nn.Parameter(torch.empty(0, dtype=parameter.dtype, device=parameter.device))
            for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def _update(self, step: Callable[[], object]) -> None:
        groups = self._optimizer.param_groups
        held_by_group = [(group, held) for group in groups for held in group["params"]]
        for (group, held), parameter in zip(held_by_group, self.parameters.values(), strict=True):
            if parameter.grad is None:
                continue
            held.data = full_tensor(parameter.detach())
            held.grad = full_tensor(parameter.grad)
            # With one parameter in its groups, torch's step does not loop over all the others.
            self._optimizer.param_groups = [{**group, "params": [held]}]
            step()
            copy_from_full_(parameter, held.detach())
            held.grad = None
            held.data = held.new_empty(0)
        self._optimizer.param_groups = groups


class SGDConfig(OptimizerConfig):
    """`[optimizer] name = "sgd"`: `torch.optim.SGD`. Weight decay is coupled: weight_decay times
    the weight is added to the gradient."""

    name: Literal["sgd"] = "sgd"
    """The optimizer."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of the running sum of gradients, in [0, 1); 0 for no momentum."""
    nesterov: bool = False
    """Nesterov momentum; has no effect with momentum = 0."""

    @model_validator(mode="after")
    def _check_nesterov(self) -> "SGDConfig":
        if self.nesterov and self.momentum == 0:
            problem = "nesterov has no effect with momentum = 0; remove it or increase momentum"
            raise VoidKeyError([VoidKey("nesterov", ("momentum",), problem)])
        return self


class AdafactorConfig(OptimizerConfig):
    """`[optimizer] name = "adafactor"`: `torch.optim.Adafactor` (arXiv 1804.04235). Second moments
    take one number per row and per column of a matrix. Weight decay is decoupled. A step gathers
    one parameter and its gradient at a time on every rank. Torch's Adafactor reads numbers from the
    device for each parameter, so the host waits for a GPU in every step."""

    name: Literal["adafactor"] = "adafactor"
    """The optimizer."""
    can_compile: ClassVar[bool] = False
    beta2_decay: float = Field(default=-0.8, lt=0)
    """The decay rate of second moments at step t is 1 - t^beta2_decay; below 0."""
    eps: float = Field(default=1e-3, gt=0)
    """Lower bound, above 0, of a parameter's root mean square, which scales its learning rate."""
    clip_threshold: float = Field(default=1.0, gt=0)
    """Updates are scaled down to this root mean square, above 0."""


def build_sgd(
    config: SGDConfig, parameters: Iterable[TrainedParameter], compile_step: bool, seed: int
) -> TrainingOptimizer:
    build = partial(torch.optim.SGD, momentum=config.momentum, nesterov=config.nesterov)
    return TorchOptimizer(config, parameters, build, compile_step)


def build_adafactor(
    config: AdafactorConfig, parameters: Iterable[TrainedParameter], compile_step: bool, seed: int
) -> TrainingOptimizer:
    build = partial(
        torch.optim.Adafactor,
        beta2_decay=config.beta2_decay,
        eps=(None, config.eps),
        d=config.clip_threshold,
    )
    return FullTensorOptimizer(config, parameters, build)

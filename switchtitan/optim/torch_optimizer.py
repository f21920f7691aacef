"""Adapters for any `torch.optim.Optimizer`, and the torch optimizers that are chosen by name."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from switchtitan.contracts import OptimizerConfig, TrainingOptimizer
from switchtitan.distributed.shards import as_shard_of, copy_from_full_, full_tensor, local
from switchtitan.optim.base import GroupedOptimizer
from switchtitan.optim.parameters import TrainedParameter

BuildOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Builds an optimizer from parameter groups with `params`, `lr` and `weight_decay`."""
InitialState = Callable[[Tensor], dict[str, Tensor]]
"""Returns the state that the optimizer has for a parameter before its first step, by torch's key,
given a tensor of the parameter's shape and device."""


class TorchOptimizer(GroupedOptimizer):
    """Adapts a torch optimizer whose update is elementwise, on local shards.

    It trains on any number of ranks as on one. The state is `<parameter>.<key>`. Tensors that have
    the parameter's shape are sharded like it, and load on another number of ranks.
    Torch itself would create the state in the first step, too late to load it.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        parameters: Iterable[TrainedParameter],
        build: BuildOptimizer,
        initial_state: InitialState,
    ) -> None:
        super().__init__(config, parameters)
        self._initial_state = initial_state
        self._held = {
            name: nn.Parameter(local(parameter.detach()))
            for name, parameter in self.parameters.items()
        }
        groups: list[dict[str, Any]] = []
        for group in self.groups:
            held = [self._held[name] for name in group.parameters]
            groups.append({"params": held, "lr": group.lr, "weight_decay": group.weight_decay})
        # Torch refuses an optimizer without groups, but not a group without parameters.
        self._optimizer = build(groups or [{"params": []}])
        for name, held_parameter in self._held.items():
            self._optimizer.state[held_parameter] = self._create_state(name)

    @torch.no_grad()
    def step(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self._held[name].grad = local(parameter.grad)
        self._optimizer.step()
        for held in self._held.values():
            held.grad = None

    def set_lr(self, lr_factor: float) -> None:
        super().set_lr(lr_factor)
        for own, group in zip(self._optimizer.param_groups, self.groups, strict=False):
            own["lr"] = group.lr * lr_factor

    def _create_state(self, name: str) -> dict[str, Tensor]:
        """Returns torch's state of a parameter, and adds it to the state that is saved."""
        parameter = self.parameters[name]
        state = self._initial_state(self._held[name].detach())
        for key, value in state.items():
            self.state[f"{name}.{key}"] = as_shard_of(value, parameter) if value.ndim else value
        return state


class FullTensorOptimizer(TorchOptimizer):
    """Adapts a torch optimizer that steps on full tensors, because its update is not elementwise.

    Every rank gathers one parameter and its gradient at a time, computes the same update, and keeps
    its local shard. State is unsharded and the same on every rank.
    """

    @torch.no_grad()
    def step(self) -> None:
        groups = self._optimizer.param_groups
        for own, group in zip(groups, self.groups, strict=False):
            for held, parameter in zip(own["params"], group.parameters.values(), strict=True):
                if parameter.grad is None:
                    continue
                held.data = full_tensor(parameter.detach())
                held.grad = full_tensor(parameter.grad)
                # With one parameter in its groups, torch's step does not loop over all the others.
                self._optimizer.param_groups = [{**own, "params": [held]}]
                self._optimizer.step()
                copy_from_full_(parameter, held.detach())
                held.grad, held.data = None, held.new_empty(0)
        self._optimizer.param_groups = groups

    def _create_state(self, name: str) -> dict[str, Tensor]:
        parameter = self.parameters[name]
        full = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        state = self._initial_state(full)
        self.state |= {f"{name}.{key}": value for key, value in state.items()}
        return state


class SGDConfig(OptimizerConfig):
    """`[optimizer] name = "sgd"`: `torch.optim.SGD`. Weight decay is coupled: weight_decay times
    the weight is added to the gradient."""

    name: Literal["sgd"] = "sgd"
    """The optimizer."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of the running sum of gradients, in [0, 1); 0 for no momentum."""
    nesterov: bool = False
    """Nesterov momentum; has no effect with momentum = 0."""

    def without_effect(self) -> list[str]:
        void = ["nesterov = true has no effect with momentum = 0"] if self.nesterov else []
        return [*super().without_effect(), *(void if self.momentum == 0 else [])]


class AdafactorConfig(OptimizerConfig):
    """`[optimizer] name = "adafactor"`: `torch.optim.Adafactor` (arXiv 1804.04235). Second moments
    take one number per row and per column of a matrix. Weight decay is decoupled. A step gathers
    one parameter and its gradient at a time on every rank. Torch's Adafactor reads numbers from the
    device for each parameter, so the host waits for a GPU in every step."""

    name: Literal["adafactor"] = "adafactor"
    """The optimizer."""
    beta2_decay: float = Field(default=-0.8, lt=0)
    """The decay rate of second moments at step t is 1 - t^beta2_decay; below 0."""
    eps: float = Field(default=1e-3, gt=0)
    """Lower bound, above 0, of a parameter's root mean square, which scales its learning rate."""
    clip_threshold: float = Field(default=1.0, gt=0)
    """Updates are scaled down to this root mean square, above 0."""


def build_sgd(
    config: SGDConfig, parameters: Iterable[TrainedParameter], compile_step: bool
) -> TrainingOptimizer:
    def initial_state(like: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(like)} if config.momentum else {}

    nesterov = config.nesterov and config.momentum > 0  # torch refuses it without momentum
    build = partial(torch.optim.SGD, momentum=config.momentum, nesterov=nesterov, foreach=True)
    return TorchOptimizer(config, parameters, build, initial_state)


def build_adafactor(
    config: AdafactorConfig, parameters: Iterable[TrainedParameter], compile_step: bool
) -> TrainingOptimizer:
    def initial_state(like: Tensor) -> dict[str, Tensor]:
        step = torch.tensor(0.0)  # on the host, as torch has it
        if like.ndim < 2:
            return {"step": step, "variance": torch.zeros_like(like)}
        rows, columns = like.new_zeros(len(like), 1), like.new_zeros(1, like.shape[1])
        return {"step": step, "row_var": rows, "col_var": columns}

    build = partial(
        torch.optim.Adafactor,
        beta2_decay=config.beta2_decay,
        eps=(None, config.eps),
        d=config.clip_threshold,
    )
    return FullTensorOptimizer(config, parameters, build, initial_state)

"""The base of the optimizers: groups of parameters, learning rates and state by name."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from switchtitan.contracts import OptimizerConfig, ParameterGroup, TrainingOptimizer
from switchtitan.distributed.shards import copy_from_full_
from switchtitan.optim.parameters import TrainedParameter, parameter_groups


class GroupedOptimizer(TrainingOptimizer):
    """Trains groups of parameters. A subclass adds its state, and a step that updates every
    parameter that has a gradient.

    Attributes:
        groups: of one learning rate and one weight decay each.
        parameters: of all groups, by qualified name.
        state: live tensors by the name that checkpoints have.
    """

    def __init__(self, config: OptimizerConfig, parameters: Iterable[TrainedParameter]) -> None:
        self.groups = parameter_groups(config, parameters)
        self.parameters = {
            name: parameter for group in self.groups for name, parameter in group.parameters.items()
        }
        self.state: dict[str, Tensor] = {}
        self._config, self._lr_factor = config, 1.0

    @property
    def rates(self) -> list[float]:
        """The current learning rate of each group."""
        return [group.lr * self._lr_factor for group in self.groups]

    def parameter_groups(self) -> list[ParameterGroup]:
        return self.groups

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def set_lr(self, lr_factor: float) -> None:
        self._lr_factor = lr_factor

    def metrics(self) -> dict[str, float]:
        """Returns the learning rates by TensorBoard tag."""
        rates = {"optimizer/lr": self._config.lr * self._lr_factor}
        if self._config.other_lr is not None:
            rates["optimizer/other_lr"] = self._config.other_lr * self._lr_factor
        return rates

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.state)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for key, tensor in self.state_dict().items():
            if isinstance(tensor, DTensor) and not isinstance(state[key], DTensor):
                copy_from_full_(tensor, state[key])  # of before parameters were sharded
            else:
                tensor.copy_(state[key])


class SplitOptimizer(TrainingOptimizer):
    """Several optimizers of disjoint parameters as one."""

    def __init__(self, parts: list[TrainingOptimizer]) -> None:
        self._parts = parts

    def step(self) -> None:
        for part in self._parts:
            part.step()

    def parameter_groups(self) -> list[ParameterGroup]:
        return [group for part in self._parts for group in part.parameter_groups()]

    def zero_grad(self) -> None:
        for part in self._parts:
            part.zero_grad()

    def set_lr(self, lr_factor: float) -> None:
        for part in self._parts:
            part.set_lr(lr_factor)

    def metrics(self) -> dict[str, float]:
        return {tag: value for part in self._parts for tag, value in part.metrics().items()}

    def replicated(self) -> dict[str, Tensor]:
        return {key: tensor for part in self._parts for key, tensor in part.replicated().items()}

    def state_dict(self) -> dict[str, Tensor]:
        return {key: tensor for part in self._parts for key, tensor in part.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for part in self._parts:
            part.load_state_dict(state)

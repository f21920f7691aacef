"""A torch optimizer around the one that a method has built."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from switchtitan.contracts import TrainingOptimizer
from switchtitan.distributed.precision import full_precision
from switchtitan.distributed.shards import local
from switchtitan.errors import CheckpointError, ConfigError
from switchtitan.library.any_model import AnyModel


class Optimizer(torch.optim.Optimizer):
    """Updates all trained parameters, and frozen weights where the method changes them.

    Each group of `param_groups` has an `lr`, which schedulers change. All state exists from the
    start: torch's checkpoints would take a step to create it, and a step may switch vectors. The
    state of the run, such as the steps done, is that of the first parameter. `build` builds the
    method's optimizer of the current parameters.
    """

    def __init__(self, model: AnyModel, build: Callable[[], TrainingOptimizer]) -> None:
        self._model, self._build, self._is_built = model, build, False
        self._bind()
        self._is_built = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises a ConfigError: all parameters to train must exist before."""
        if self._is_built:
            raise ConfigError("add_param_group: unfreeze parameters before building the optimizer")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step; a parameter without a gradient stays as it is, as in torch's AdamW."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._rebind_if_moved()
        self._check_trains()
        for own, group in zip(self.param_groups, self._inner.parameter_groups(), strict=True):
            group.lr = float(own["lr"])
        self._inner.set_lr(1.0)
        with full_precision():
            self._inner.step()
        return loss

    def metrics(self) -> dict[str, float]:
        """Returns scalars of the last step, such as `switch/vectors_switched_total`."""
        found = self._inner.metrics().items()
        return {tag: value for tag, value in found if not tag.startswith("optimizer/")}

    def state_dict(self) -> dict[str, Any]:
        self._rebind_if_moved()
        self._collect_state()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies into the state: torch would cast the integers of a plan to the parameters' dtype.
        Raises a CheckpointError if the state is of another method, rank or model."""
        self._rebind_if_moved()
        ids = [number for group in state_dict["param_groups"] for number in group["params"]]
        saved = {
            p: state_dict["state"].get(i, {}) for p, i in zip(self._owned(), ids, strict=False)
        }
        given, own = {}, self._inner.state_dict()
        for key, (parameter, name) in self._owners.items():
            value = given[key] = saved.get(parameter, {}).get(name)
            if value is None or value.shape != own[key].shape:
                found = "nothing" if value is None else list(value.shape)
                raise CheckpointError(
                    f"the state has {found} for {key}, expected {list(own[key].shape)}: it is "
                    "another method's, rank's or model's"
                )
        super().load_state_dict({**state_dict, "state": {}})  # the groups
        self._inner.load_state_dict(given)
        self._collect_state()

    def _bind(self) -> None:
        """Builds the inner optimizer, which holds views of the parameters, and its state."""
        self._inner = self._build()
        groups = self._inner.parameter_groups()
        if not self._is_built:
            super().__init__([{"params": [*g.parameters.items()], "lr": g.lr} for g in groups], {})
        for own, group in zip(self.param_groups, groups, strict=True):
            own["params"] = [*group.parameters.values()]
        self._bound, self._owners = self._addresses(), dict[str, tuple[Tensor, str]]()
        named = {name: p for group in groups for name, p in group.parameters.items()}
        for key in self._inner.state_dict():
            name = key
            while name and name not in named:
                name = name.rpartition(".")[0]
            self._owners[key] = named.get(name, self._owned()[0]), key[len(name) :].lstrip(".")
        self.state.clear()
        self._collect_state()

    def _rebind_if_moved(self) -> None:
        """Follows parameters that were moved, or replaced in the groups, as accelerate does it."""
        if self._addresses() != self._bound:
            state = self._inner.state_dict()
            self._bind()
            self._inner.load_state_dict(state)

    def _check_trains(self) -> None:
        """Raises a ConfigError if the parameters are no longer those of the model."""
        if self._model.is_merged:
            raise ConfigError("the method was merged: apply it again, and build a new optimizer")
        if all(parameter.grad is None for parameter in self._owned()):
            current = {id(parameter) for _, parameter in self._model.named_parameters()}
            if not current.issuperset(map(id, self._owned())):
                raise ConfigError("the model has new parameters: call optimizer after fully_shard")

    def _collect_state(self) -> None:
        for key, value in self._inner.state_dict().items():
            parameter, name = self._owners[key]
            self.state[parameter][name] = value.to(parameter.device)  # torch expects one device

    def _owned(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _addresses(self) -> list[int]:
        return [local(parameter).data_ptr() for parameter in self._owned()]

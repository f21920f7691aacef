"""The optimizer of a model some of whose weights train from projected gradients."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from switchtitan.contracts import TrainingOptimizer
from switchtitan.methods.projected.config import ProjectedConfig
from switchtitan.methods.projected.weights import ProjectedWeight, build_projected_weight, targeted_weights
from switchtitan.optim import AdamW, AdamWConfig, trained_parameters


class UpdateRule(Protocol):
    """How a method updates the projected weights."""

    def update_(self, step: int, step_size: float, kept: float) -> None:
        """Updates all weights from their gradients, on a new basis where one is due.

        Args:
            step: steps done before.
            step_size: lr sqrt(1 - beta2^n) / (1 - beta1^n) at the n-th step: the bias correction of Adam's first paper (arXiv
                1412.6980, end of sec. 2), in which eps is added to the uncorrected root.
            kept: 1 - lr * weight_decay, by which weights are multiplied.
        """
        ...

    def metrics(self) -> dict[str, float]: ...

    def state_dict(self) -> dict[str, Tensor]:
        """What the rule keeps beside moments, to be loaded in place."""
        ...


class ProjectedOptimizer:
    """A rule for the projected weights and a plain optimizer for the other parameters; a `contracts.TrainingOptimizer`.

    Args:
        weights: those that `rule` updates.
        dense: the optimizer of the rest.
        update_interval: steps between two bases.
    """

    def __init__(
        self,
        config: AdamWConfig,
        weights: list[ProjectedWeight],
        rule: UpdateRule,
        dense: TrainingOptimizer,
        update_interval: int,
    ) -> None:
        self._config, self._weights, self._rule, self._dense = config, weights, rule, dense
        self._update_interval = update_interval
        self._num_steps = 0
        # A Python number that products take as an argument: the device never has to tell it.
        self._lr = config.lr

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter."""
        (beta1, beta2), num_steps = self._config.betas, self._num_steps + 1
        self._rule.update_(
            self._num_steps,
            step_size=self._lr * (1 - beta2**num_steps) ** 0.5 / (1 - beta1**num_steps),
            kept=1 - self._lr * self._config.weight_decay,
        )
        self._num_steps = num_steps
        self._dense.step()

    def zero_grad(self) -> None:
        for weight in self._weights:
            weight.parameter.grad = None
        self._dense.zero_grad()

    def set_lr(self, lr_factor: float) -> None:
        self._lr = self._config.lr * lr_factor
        self._dense.set_lr(lr_factor)

    def metrics(self) -> dict[str, float]:
        """Besides the rule's: how often bases have been renewed so far, the first ones included."""
        num_refreshes = -(-self._num_steps // self._update_interval)
        return {
            **self._dense.metrics(),
            "projection/refreshes": float(num_refreshes),
            **self._rule.metrics(),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The dense optimizer's, the rule's, `<weight>.exp_avg`, `<weight>.exp_avg_sq` and `projection.step`."""
        moments = {
            f"{weight.name}.{key}": tensor
            for weight in self._weights
            for key, tensor in (("exp_avg", weight.exp_avg), ("exp_avg_sq", weight.exp_avg_sq))
        }
        step = {"projection.step": torch.tensor(self._num_steps)}
        return self._dense.state_dict() | moments | self._rule.state_dict() | step

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for key, tensor in self.state_dict().items():
            tensor.copy_(state[key])
        self._num_steps = int(state["projection.step"])


def build_projected_optimizer(
    model: nn.Module,
    method: ProjectedConfig,
    config: AdamWConfig,
    build_rule: Callable[[list[ProjectedWeight]], UpdateRule],
) -> ProjectedOptimizer:
    """An optimizer whose rule has the weights of the targeted layers, and whose dense part has all other parameters."""
    targeted = targeted_weights(model, method.targets)
    weights = [build_projected_weight(name, parameter, method.rank) for name, parameter in targeted.items()]
    others = [p for p in trained_parameters(model, targeted) if p.is_other]
    # Not compiled: torch's fused kernel takes these few tensors in one pass already.
    dense = AdamW(config, others)
    return ProjectedOptimizer(config, weights, build_rule(weights), dense, method.update_interval)

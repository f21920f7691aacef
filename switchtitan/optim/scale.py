"""SCALE: SGD whose matrices have a gradient of unit size for each output (arXiv 2506.16659)."""

from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from switchtitan.contracts import TrainingOptimizer
from switchtitan.distributed.norms import sum_packed
from switchtitan.distributed.shards import local
from switchtitan.optim.adamw import AdamKeys, AdamW
from switchtitan.optim.base import GroupedOptimizer, SplitOptimizer
from switchtitan.optim.parameters import TrainedParameter

_TINY_RMS = 1e-8
"""Lower bound of the root mean squares in denominators, as in the authors' code."""


class ScaleConfig(AdamKeys):
    """`[optimizer] name = "scale"`: SCALE (arXiv 2506.16659). Gradients of matrices are divided by
    their root mean square over the inputs of each output, and only the head has momentum. 1-dim
    parameters train with AdamW, whose keys are betas and eps. Weight decay is decoupled. Needs a
    head that is not tied."""

    name: Literal["scale"] = "scale"
    """The optimizer."""
    needs_head: ClassVar[bool] = True
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of the running mean of the head's gradients, in [0, 1)."""
    vector_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate, above 0, of 1-dim parameters, such as norms and the values of
    sparse matrices. Default: as for matrices. The authors' code has 0.02."""


class Scale(GroupedOptimizer):
    """W <- (1 - lr weight_decay) W - lr G / rms(G) (arXiv 2506.16659, Alg. 1).

    rms is the root mean square of G over the inputs of a linear map: one number for each output,
    which is a column where the paper writes a matrix [in, out]. G is the gradient, for the head its
    running mean, which is the state `<head>.momentum`. The paper divides by the norm; the authors'
    code, whose learning rates are published, divides by the root mean square, and so do we.

    The inputs of most matrices are within a row, and a step sends nothing for them. Those of an
    embedding [vocabulary, dim], and of a factor stored transposed, are its rows: on several ranks,
    one all-reduce sums their squares. Matrices are fp32, and one of them belongs to the head.
    """

    def __init__(self, config: ScaleConfig, matrices: list[TrainedParameter]) -> None:
        super().__init__(config, matrices)
        self._momentum, self._vector_lr = config.momentum, config.vector_lr
        self._first = matrices[0].parameter
        self._over_rows = {entry.name for entry in matrices if entry.input_dim == 0}
        for entry in matrices:
            if entry.is_head:
                zeros = torch.zeros_like(entry.parameter, requires_grad=False)
                self.state[f"{entry.name}.momentum"] = zeros

    @torch.no_grad()
    def step(self) -> None:
        directions = self._directions()
        norms = self._norms(directions)
        for group, lr in zip(self.groups, self.rates, strict=True):
            for name, parameter in group.parameters.items():
                if name not in directions:
                    continue
                shard = local(parameter)
                if group.weight_decay:
                    shard.mul_(1 - lr * group.weight_decay)
                rms = norms[name].clamp_(min=_TINY_RMS)
                shard.addcdiv_(directions[name], rms, value=-lr)

    def metrics(self) -> dict[str, float]:
        rates = super().metrics()
        if self._vector_lr is not None:
            rates["optimizer/vector_lr"] = self._vector_lr * self._lr_factor
        return rates

    def _directions(self) -> dict[str, Tensor]:
        """Updates the momentum; returns local shards of what is normalized, by name."""
        directions = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            directions[name] = local(parameter.grad)
            if f"{name}.momentum" in self.state:
                momentum = local(self.state[f"{name}.momentum"])
                directions[name] = momentum.lerp_(directions[name], 1 - self._momentum)
        return directions

    def _norms(self, directions: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns root mean squares by name: [out/ranks, 1], over rows [1, width]."""
        over_rows = [name for name in directions if name in self._over_rows]
        squares = [directions[name].square().sum(0, keepdim=True) for name in over_rows]
        sums = dict(zip(over_rows, sum_packed(squares, self._first), strict=True))
        norms = {}
        for name, direction in directions.items():
            shape = self.parameters[name].shape
            if name in sums:
                norms[name] = (sums[name] / shape[0]).sqrt()
            else:
                norm = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
                norms[name] = norm / shape[1] ** 0.5
        return norms


def build_scale(
    config: ScaleConfig, parameters: Iterable[TrainedParameter], compile_step: bool
) -> TrainingOptimizer:
    """Returns SCALE for matrices, and AdamW for other parameters."""
    trained = list(parameters)
    matrices = [entry for entry in trained if entry.parameter.ndim == 2]
    vector_config = config
    if config.vector_lr is not None:
        vector_config = config.model_copy(update={"lr": config.vector_lr, "other_lr": None})
    vectors = [entry for entry in trained if entry.parameter.ndim != 2]
    # Metrics are those of the last part.
    return SplitOptimizer([AdamW(vector_config, vectors), Scale(config, matrices)])

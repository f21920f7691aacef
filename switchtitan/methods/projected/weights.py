"""Weights that train from projected gradients: on which side they are projected, and what is kept for each.

For G [out, in] the smaller dimension is projected (GaLore, arXiv 2403.03507, sec. 4.2; squares as in the authors' code):

    right, out >= in    R = G Q       [out, rank] with Q [in, rank]
    left,  out < in     R = Q^T G     [rank, in]  with Q [out, rank]

Ranks share out the rows of G. On the right R's rows are local if every rank has Q whole, so a step needs no collective for
it. On the left each rank has a summand of R and its rows of Q.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import zeros as distributed_zeros

from switchtitan.contracts import MethodConfig
from switchtitan.distributed.shards import local
from switchtitan.errors import ConfigError
from switchtitan.methods.lowrank.config import ADAPTED_LINEARS, Targets, check_rank, check_targets


class ProjectedConfig(MethodConfig):
    """Which gradients are projected, onto how many dimensions, and for how long."""

    optimizers: ClassVar[frozenset[str] | None] = frozenset({"adamw"})
    rank: int = Field(ge=1)
    """Dimensions that gradients are projected onto, at least 1 and below the smaller dimension of every projected weight."""
    update_interval: int = Field(default=200, ge=1)
    """Steps for which a projection is kept before the next one; at least 1."""
    targets: Targets = ADAPTED_LINEARS
    """Local names of the linear layers whose weights' gradients are projected; by default all of attention and MLP. The other
    parameters train with plain AdamW."""

    def check_model(self, linear_shapes: dict[str, tuple[int, int]]) -> list[str]:
        """What is wrong between this section and a model's linear layers, qualified name -> (out, in)."""
        return check_rank(self.rank, self.targets, linear_shapes)


@dataclass(frozen=True)
class ProjectedWeight:
    """A weight, the basis that its gradient is projected onto, and Adam's moments of the projection."""

    name: str
    """Of the parameter, qualified."""
    parameter: nn.Parameter
    """[out, in], plain or split along dimension 0."""
    basis: Tensor
    """Q: on the right [in, rank], whole on every rank; on the left [out, rank], split as the weight is. Starts as zeros."""
    exp_avg: Tensor
    """[out, rank] on the right, [rank, in] on the left; split along dimension 0 in both cases."""
    exp_avg_sq: Tensor
    """As `exp_avg`."""

    @property
    def is_right(self) -> bool:
        return is_right(self.parameter)

    @property
    def local_grad(self) -> Tensor:
        """This rank's rows of the gradient, [out/ranks, in]."""
        assert self.parameter.grad is not None, f"no gradient for {self.name}"
        return local(self.parameter.grad)


def is_right(weight: Tensor) -> bool:
    """Whether the gradient of a weight [out, in] is multiplied by its basis from the right."""
    return weight.shape[0] >= weight.shape[1]


def project(weight: ProjectedWeight) -> Tensor:
    """R: this rank's rows of it [out/ranks, rank] on the right, its summand [rank, in] on the left."""
    grad, basis = weight.local_grad, local(weight.basis)
    return grad @ basis if weight.is_right else basis.t() @ grad


def build_projected_weight(name: str, parameter: nn.Parameter, rank: int) -> ProjectedWeight:
    """A weight with an empty basis and empty moments, on its device and split over its ranks."""
    out_features, in_features = parameter.shape
    if is_right(parameter):
        basis = torch.zeros(in_features, rank, device=parameter.device, dtype=parameter.dtype)
        moments_shape = (out_features, rank)
    else:
        basis = _zeros_split_like(parameter, (out_features, rank))
        moments_shape = (rank, in_features)
    exp_avg, exp_avg_sq = (_zeros_split_like(parameter, moments_shape) for _ in range(2))
    return ProjectedWeight(name, parameter, basis, exp_avg, exp_avg_sq)


def targeted_weights(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Parameter]:
    """The weights of the linear layers whose local names are among `targets`, by qualified parameter name.

    Raises:
        ConfigError: if a target names no linear layer of the model.
    """
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    targets = tuple(targets)
    if problems := check_targets(targets, linears):
        raise ConfigError(problems[0])
    wanted = {f"{name}.weight" for name in linears if name.rpartition(".")[2] in targets}
    return {name: parameter for name, parameter in model.named_parameters() if name in wanted}


def _zeros_split_like(parameter: Tensor, shape: tuple[int, int]) -> Tensor:
    if isinstance(parameter, DTensor):
        return distributed_zeros(
            shape,
            dtype=parameter.dtype,
            device_mesh=parameter.device_mesh,
            placements=parameter.placements,
        )
    return torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)

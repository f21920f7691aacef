"""Weights that train from projected gradients: the side of the projection, and the state of each.

The smaller dimension of G [out, in] is projected (GaLore, arXiv 2403.03507, sec. 4.2; square ones
on the right, as in the authors' code):

    right, out >= in    R = G Q       [out, rank] with Q [in, rank]
    left,  out < in     R = Q^T G     [rank, in]  with Q [out, rank]

G is sharded over rows. On the right, every rank has the full Q, and R's rows are local: a step
needs no collective for it. On the left, each rank has its rows of Q and a summand of R.
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
    """The configuration keys of methods that project gradients."""

    optimizers: ClassVar[frozenset[str] | None] = frozenset({"adamw"})
    rank: int = Field(ge=1)
    """Dimensions that gradients are projected onto: at least 1, and below the smaller dimension of
    every projected weight."""
    update_interval: int = Field(default=200, ge=1)
    """Steps between two projections; at least 1."""
    targets: Targets = ADAPTED_LINEARS
    """Local names of the linear layers whose gradients are projected; by default all of attention
    and MLP. All other parameters train with AdamW."""

    def draws_in_forward(self) -> bool:
        """See `contracts.MethodConfig`."""
        return False

    def check_model(self, linear_shapes: dict[str, tuple[int, int]]) -> list[str]:
        """See `contracts.MethodConfig`."""
        return check_rank(self.rank, self.targets, linear_shapes)


@dataclass(frozen=True)
class ProjectedWeight:
    """A weight, the basis that its gradient is projected onto, and Adam's moments of the
    projection."""

    name: str
    """The parameter's qualified name."""
    parameter: nn.Parameter
    """[out, in], plain or sharded along dimension 0."""
    basis: Tensor
    """Q: [in, rank] on the right, unsharded; [out, rank] on the left, sharded like the weight.
    Initially zero."""
    exp_avg: Tensor
    """[out, rank] on the right, [rank, in] on the left; both sharded along dimension 0."""
    exp_avg_sq: Tensor
    """Like `exp_avg`."""

    @property
    def is_right(self) -> bool:
        return is_right(self.parameter)

    @property
    def local_grad(self) -> Tensor:
        """The local shard of the gradient, [out/ranks, in]."""
        assert self.parameter.grad is not None, f"no gradient for {self.name}"
        return local(self.parameter.grad)


def is_right(weight: Tensor) -> bool:
    """Whether the gradient of a weight [out, in] is multiplied by its basis from the right."""
    return weight.shape[0] >= weight.shape[1]


def project(weight: ProjectedWeight) -> Tensor:
    """Returns R: its local rows [out/ranks, rank] on the right, a summand [rank, in] on the
    left."""
    grad, basis = weight.local_grad, local(weight.basis)
    return grad @ basis if weight.is_right else basis.t() @ grad


def build_projected_weight(name: str, parameter: nn.Parameter, rank: int) -> ProjectedWeight:
    """Builds the state of a weight, with basis and moments at zero."""
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
    """Returns the weights of the linear layers in `targets`, by qualified parameter name.

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

"""GaLore: Adam in the subspace of each gradient's leading singular vectors (arXiv 2403.03507)."""

from functools import partial
from itertools import islice
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from switchtitan.contracts import LanguageModel, Method, OptimizerConfig, TrainingOptimizer
from switchtitan.distributed.shards import (
    copy_from_full_,
    local,
    replica_group,
    rows_per_rank,
    shard_group,
)
from switchtitan.methods.projected import (
    PackedRows,
    ProjectedConfig,
    ProjectedWeight,
    build_projected_optimizer,
    is_right,
    project,
)
from switchtitan.optim import AdamWConfig, require_adamw


class GaloreConfig(ProjectedConfig):
    """`[method] name = "galore"`: GaLore (arXiv 2403.03507). On a GPU, the host waits for torch's
    decompositions when bases are renewed, every `update_interval` steps. They run in fp64,
    slow on GPUs that compute it at 1/64 of the rate of fp32; a larger interval means fewer."""

    name: Literal["galore"] = "galore"
    """The method."""
    scale: float = Field(default=0.25, gt=0)
    """Updates of the projected weights are multiplied by this (alpha in the paper), above 0."""


class Galore(Method[GaloreConfig]):
    """Trains all weights; the optimizer state of the targeted ones is low-rank."""

    def build_optimizer(
        self, model: LanguageModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        adamw = require_adamw(config)
        build_rule = partial(GaloreRule, self.config, adamw, compile_step=compile_step)
        return build_projected_optimizer(
            model, self.config, adamw, build_rule, compile_step, self.seed
        )


class GaloreRule:
    """W <- decay_factor W - step_size scale (N Q^T), N = M / (sqrt(V) + eps).

    (arXiv 2403.03507, Alg. 2.) M and V are the moments of R = G Q. As in the authors' code, eps is
    added to the root of the second moment before the bias correction, which is part of the step
    size; moments are kept when the basis changes; the first basis is that of the first gradient.
    Weight decay is that of AdamW (arXiv 1711.05101), before the update.

    Weights projected on the left (out < in) take two collectives a step together: a reduce-scatter
    of R, and an all-gather of N. Weights projected on the right take none, since their bases are
    unsharded.

    Args:
        compile_step: fuse the elementwise operations.
    """

    def __init__(
        self,
        config: GaloreConfig,
        adam: AdamWConfig,
        weights: list[ProjectedWeight],
        compile_step: bool,
    ) -> None:
        self._config, self._adam, self._weights = config, adam, weights
        self._right = [weight for weight in weights if weight.is_right]
        self._left = [weight for weight in weights if not weight.is_right]
        self._rows = PackedRows([weight.exp_avg for weight in self._left])
        self._direction = (
            torch.compile(direction_, fullgraph=True, dynamic=False) if compile_step else direction_
        )

    def update(self, step: int, step_size: float, decay_factor: float) -> None:
        """See `projected.optimizer.UpdateRule`."""
        if step % self._config.update_interval == 0:
            refresh_bases_(self._weights)
        coefficient = -step_size * self._config.scale
        if self._left:
            sums = self._rows.sum_and_scatter([project(weight) for weight in self._left])
            parts = [
                self._advance(weight, low) for weight, low in zip(self._left, sums, strict=True)
            ]
            for weight, direction in zip(self._left, self._rows.gather(parts), strict=True):
                local(weight.parameter).addmm_(
                    local(weight.basis), direction, beta=decay_factor, alpha=coefficient
                )
        for weight in self._right:
            direction = self._advance(weight, project(weight))
            local(weight.parameter).addmm_(
                direction, weight.basis.t(), beta=decay_factor, alpha=coefficient
            )

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Returns `<weight>.basis`, which is kept for many steps and cannot be recomputed."""
        return {f"{weight.name}.basis": weight.basis for weight in self._weights}

    def _advance(self, weight: ProjectedWeight, low_rank_grad: Tensor) -> Tensor:
        """Updates the moments from this rank's rows of R; returns those of N."""
        if low_rank_grad.numel() == 0:
            return low_rank_grad
        beta1, beta2 = self._adam.betas
        return self._direction(
            low_rank_grad,
            local(weight.exp_avg),
            local(weight.exp_avg_sq),
            beta1=beta1,
            beta2=beta2,
            eps=self._adam.eps,
        )


def direction_(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, beta1: float, beta2: float, eps: float
) -> Tensor:
    """Updates the moments M and V in place; returns M / (sqrt(V) + eps)."""
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    return exp_avg / (exp_avg_sq.sqrt() + eps)


def refresh_bases_(weights: list[ProjectedWeight]) -> None:
    """Sets each weight's basis to the leading singular vectors of its gradient.

    Replicas share the weights among them, and then send each other the bases: two devices may
    decompose the same gradient differently, by rounding.
    """
    replicas = replica_group(weights[0].parameter)
    if replicas is None:
        _refresh_own_bases_(weights)
        return
    own, num_replicas = replicas.rank(), replicas.size()
    _refresh_own_bases_(weights[own::num_replicas])
    for index, weight in enumerate(weights):
        if local(weight.basis).numel():
            dist.broadcast(local(weight.basis), group=replicas, group_src=index % num_replicas)


def _refresh_own_bases_(weights: list[ProjectedWeight]) -> None:
    """Sets bases on the ranks of a shard group, which take turns: each gathers and decomposes one
    gradient at a time."""
    if not weights:
        return
    group = shard_group(weights[0].parameter)
    num_ranks = 1 if group is None else group.size()
    queue = iter(weights)
    while round_ := list(islice(queue, num_ranks)):
        if group is None:
            bases = [
                leading_singular_vectors(weight.local_grad, weight.basis.shape[1])
                for weight in round_
            ]
        else:
            bases = _decompose_on_own_ranks(round_, group)
        for weight, basis in zip(round_, bases, strict=True):
            copy_from_full_(weight.basis, basis)


def leading_singular_vectors(grad: Tensor, rank: int) -> Tensor:
    """Returns the leading singular vectors of a gradient [out, in].

    They are the leading eigenvectors of the smaller Gram matrix, G^T G or G G^T, in fp64: squaring
    loses half the digits, and half of those of fp64 are more than an fp32 gradient has. That is
    more exact than an SVD in fp32, and on a CPU takes as long (1024 x 2736 on one thread: 1.3 s).

    The largest entry of each vector is positive. Moments are kept when the basis changes, so the
    sign of a vector must not depend on rounding or on the number of ranks.

    Returns:
        Right ones [in, rank] if out >= in, else left ones [out, rank].
    """
    # The trainer reports a gradient that is not finite. An error here would leave other ranks
    # waiting.
    matrix = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0).to(torch.float64)
    gram = matrix.t() @ matrix if is_right(grad) else matrix @ matrix.t()
    # In ascending order.
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).to(grad.dtype)


def _decompose_on_own_ranks(
    weights: list[ProjectedWeight], group: dist.ProcessGroup
) -> list[Tensor]:
    """Returns the full bases of at most one weight per rank; rank i decomposes gradient i."""
    own_rank = group.rank()
    gathered = [_gather_rows(weight, owner, group) for owner, weight in enumerate(weights)]
    bases = []
    for owner, (weight, grad) in enumerate(zip(weights, gathered, strict=True)):
        if owner == own_rank:
            assert grad is not None
            bases.append(leading_singular_vectors(grad, weight.basis.shape[1]).contiguous())
        else:
            bases.append(
                torch.empty(
                    weight.basis.shape, dtype=weight.basis.dtype, device=weight.basis.device
                )
            )
    for owner, basis in enumerate(bases):
        dist.broadcast(basis, group=group, group_src=owner)
    return bases


def _gather_rows(weight: ProjectedWeight, owner: int, group: dist.ProcessGroup) -> Tensor | None:
    """Returns the full gradient on the rank `owner` of the group, None on the others."""
    num_rows, width = weight.parameter.shape
    grad = weight.local_grad
    padded = grad.new_zeros(rows_per_rank(num_rows, group.size()), width)
    padded[: grad.shape[0]] = grad
    parts = (
        [torch.empty_like(padded) for _ in range(group.size())] if group.rank() == owner else None
    )
    dist.gather(padded, parts, group=group, group_dst=owner)
    return None if parts is None else torch.cat(parts)[:num_rows]

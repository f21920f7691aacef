"""GaLore: Adam in the subspace of each gradient's leading singular vectors (arXiv 2403.03507)."""

from functools import partial
from itertools import islice
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from switchtitan.contracts import LanguageModel, Method, OptimizerConfig, TrainingOptimizer
from switchtitan.distributed.shards import copy_from_full_, local, rows_per_rank, shard_group
from switchtitan.methods.projected import (
    PackedRows,
    ProjectedConfig,
    ProjectedWeight,
    build_projected_optimizer,
    project,
)
from switchtitan.optim import AdamWConfig, require_adamw


class GaloreConfig(ProjectedConfig):
    """`[method] name = "galore"`: GaLore (arXiv 2403.03507)."""

    name: Literal["galore"] = "galore"
    """The method."""
    scale: float = Field(default=0.25, gt=0)
    """Updates of the projected weights are multiplied by this (alpha in the paper), above 0."""


class Galore(Method[GaloreConfig]):
    """All weights train; the optimizer's state of the largest ones is low-rank."""

    def build_optimizer(
        self, model: LanguageModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        adamw = require_adamw(config)
        build_rule = partial(GaloreRule, self.config, adamw, compile_step=compile_step)
        return build_projected_optimizer(model, self.config, adamw, build_rule)


class GaloreRule:
    """W <- kept W - step_size scale (N Q^T), N = M / (sqrt(V) + eps), with moments M, V of R = G Q (arXiv 2403.03507, Alg. 2).

    As in the authors' code: eps is added to the root of the second moment before the bias correction, which is part of the step
    size; moments are kept when the basis changes; the first basis is that of the first gradient. Weight decay is that of AdamW
    (arXiv 1711.05101), before the update.

    Weights that are projected on the left, with out < in, have two collectives a step between them: the sum of R, scattered
    over the ranks, which hold the moments' rows, and N's rows gathered. Bases on the right are whole on every rank, in * rank
    values each, so that the other weights need none.

    Args:
        compile_step: fuse the elementwise part, which is all but the products.
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

    def update_(self, step: int, step_size: float, kept: float) -> None:
        """See `projected.optimizer.UpdateRule`."""
        if step % self._config.update_interval == 0:
            refresh_bases_(self._weights)
        coefficient = -step_size * self._config.scale
        if self._left:
            sums = self._rows.sum_and_scatter([project(weight) for weight in self._left])
            parts = [
                self._advance_(weight, low) for weight, low in zip(self._left, sums, strict=True)
            ]
            for weight, direction in zip(self._left, self._rows.gather(parts), strict=True):
                local(weight.parameter).addmm_(
                    local(weight.basis), direction, beta=kept, alpha=coefficient
                )
        for weight in self._right:
            direction = self._advance_(weight, project(weight))
            local(weight.parameter).addmm_(
                direction, weight.basis.t(), beta=kept, alpha=coefficient
            )

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """`<weight>.basis`: unlike the gradient that it comes from, a basis lives on for many steps."""
        return {f"{weight.name}.basis": weight.basis for weight in self._weights}

    def _advance_(self, weight: ProjectedWeight, low_rank_grad: Tensor) -> Tensor:
        """N, after the moments have taken in this rank's rows of R."""
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
    """M / (sqrt(V) + eps), with M and V, all of one shape, updated in place."""
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    return exp_avg / (exp_avg_sq.sqrt() + eps)


def refresh_bases_(weights: list[ProjectedWeight]) -> None:
    """Sets each weight's basis to the leading singular vectors of its gradient.

    Ranks share the work: each decomposes every so many-th matrix, of which it alone gets the whole gradient. Replicas repeat
    each other's work on equal numbers.
    """
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
    """[in, rank] right singular vectors of a gradient [out, in] if out >= in, else [out, rank] left ones.

    The largest entry of each vector is positive. Which sign a vector gets does not matter to its subspace, but to moments that
    were gathered along the vector before it; so it must not depend on rounding, nor on the number of ranks.
    """
    # The trainer reports a gradient that is not finite; here it would stop one rank while the others wait for it.
    matrix = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)
    left, _, right_t = torch.linalg.svd(matrix, full_matrices=False)
    vectors = (right_t.t() if grad.shape[0] >= grad.shape[1] else left)[:, :rank]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


def _decompose_on_own_ranks(
    weights: list[ProjectedWeight], group: dist.ProcessGroup
) -> list[Tensor]:
    """The whole bases of at most as many weights as there are ranks; the i-th rank decomposes the i-th."""
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
    """The whole gradient on the rank `owner` of the group, nothing on the others."""
    num_rows, width = weight.parameter.shape
    grad = weight.local_grad
    padded = grad.new_zeros(rows_per_rank(num_rows, group.size()), width)
    padded[: grad.shape[0]] = grad
    parts = (
        [torch.empty_like(padded) for _ in range(group.size())] if group.rank() == owner else None
    )
    dist.gather(padded, parts, group=group, group_dst=owner)
    return None if parts is None else torch.cat(parts)[:num_rows]

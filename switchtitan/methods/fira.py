"""Fira: GaLore plus the residual of each gradient, scaled as Adam scales the projection (arXiv
2410.01623)."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from switchtitan.distributed.compilation import compile_if
from switchtitan.distributed.norms import sum_packed
from switchtitan.distributed.shards import local, shard_group
from switchtitan.methods.projected import (
    TINY_NORM,
    AdamDirections,
    NormGrowthLimiter,
    PackedRows,
    ProjectedConfig,
    ProjectedMethod,
    ProjectedWeight,
    project,
    refresh_bases_,
)
from switchtitan.optim import AdamWConfig


class FiraConfig(ProjectedConfig):
    """`[method] name = "fira"`: Fira (arXiv 2410.01623). Bases are those of GaLore, with the same
    waits on a GPU. Moments of projected gradients are in fp32 with every `[optimizer]
    moments_dtype`."""

    name: Literal["fira"] = "fira"
    """The method."""
    scale: float = Field(default=0.25, gt=0)
    """Multiplies the update that is projected back (alpha in the paper); above 0. The residual is
    G - scale R Q^T, with the gradient G, the basis Q and R = G Q; with scale = 1 it is orthogonal
    to the basis."""
    max_norm_growth: float = Field(default=1.01, gt=1)
    """Largest factor, above 1, by which the norm of a weight's scaled residual may grow in a step
    (gamma in the paper)."""


class Fira(ProjectedMethod[FiraConfig]):
    """Trains all weights; the optimizer state of the targeted ones is low-rank."""

    def build_rule(
        self, adamw: AdamWConfig, weights: list[ProjectedWeight], compile_step: bool
    ) -> "FiraRule":
        return FiraRule(self.config, adamw, weights, compile_step)


class Projected(NamedTuple):
    """The projection of a gradient and what Adam makes of it."""

    low_rank_grad: Tensor
    """R: local rows [out/ranks, rank] on the right, all of [rank, in] on the left."""
    direction: Tensor
    """N, like R."""


class FiraRule:
    """W <- decay_factor W - step_size (scale N Q^T + S / limiter), S = phi (G - scale R Q^T).

    (arXiv 2410.01623.) R = G Q and N as in GaLore. phi = ||N|| / ||R|| of each row of R where the
    projection is on the right, of each column where it is on the left. The limiter keeps ||S||
    below `max_norm_growth` times its limited value in the step before; the first step is not
    limited. The paper subtracts R Q^T. The authors' package subtracts scale R Q^T, and the
    published runs have scale 0.25, so we follow the package. As in the package, moments are kept
    when the basis changes. Weight decay is that of AdamW (arXiv 1711.05101), before the update; the
    package decays after it.

    On several ranks, a step has three collectives: a reduce-scatter of R and an all-gather of R and
    N, for weights projected on the left (out < in), and a sum of squares for all weights.

    Args:
        compile_step: fuse the elementwise operations.
    """

    def __init__(
        self,
        config: FiraConfig,
        adam: AdamWConfig,
        weights: list[ProjectedWeight],
        compile_step: bool,
    ) -> None:
        self._config, self._weights = config, weights
        self._left = [weight for weight in weights if not weight.is_right]
        self._rows = PackedRows([weight.exp_avg for weight in self._left])
        self._pairs = PackedRows([weight.exp_avg for weight in self._left] * 2)
        first = weights[0].parameter
        self._group = shard_group(first)
        self._limiter = NormGrowthLimiter(len(weights), config.max_norm_growth, local(first))
        self._directions = AdamDirections(adam, compile_step)
        self._measure: Callable[..., tuple[Tensor, Tensor]] = compile_if(compile_step)(
            factors_and_square
        )

    def update(self, step: int, step_size: float, decay_factor: float) -> None:
        """See `projected.optimizer.UpdateRule`."""
        if step % self._config.update_interval == 0:
            refresh_bases_(self._weights)
        projections = self._projections()
        measured = [
            self._factors_and_square(weight, projected)
            for weight, projected in zip(self._weights, projections, strict=True)
        ]
        squares = sum_packed([square for _, square in measured], self._group)
        limiters = self._limiter.divisors(torch.stack(squares).sqrt()).unbind()
        for index, weight in enumerate(self._weights):
            scaling = measured[index][0] / limiters[index]
            self._apply(weight, projections[index], scaling, step_size, decay_factor)

    def metrics(self) -> dict[str, float]:
        return self._limiter.metrics()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the norms of the last updates and `<weight>.basis`, which is kept for many steps
        and cannot be recomputed."""
        bases = {f"{weight.name}.basis": weight.basis for weight in self._weights}
        return bases | self._limiter.state_dict()

    def _projections(self) -> list[Projected]:
        """Updates the moments; returns R and N of each weight."""
        sums = self._rows.sum_and_scatter([project(weight) for weight in self._left])
        parts = [
            self._directions.advance(weight, low)
            for weight, low in zip(self._left, sums, strict=True)
        ]
        gathered = self._pairs.gather([*sums, *parts])
        on_left = zip(gathered[: len(sums)], gathered[len(sums) :], strict=True)
        projections = []
        for weight in self._weights:
            if weight.is_right:
                low = project(weight)
                projections.append(Projected(low, self._directions.advance(weight, low)))
            else:
                projections.append(Projected(*next(on_left)))
        return projections

    def _factors_and_square(
        self, weight: ProjectedWeight, projected: Projected
    ) -> tuple[Tensor, Tensor]:
        """Returns phi, [out/ranks, 1] or [1, in], and this rank's summand of ||S||^2, 0-dim."""
        grad, low = weight.local_grad, projected.low_rank_grad
        left, right = (low, weight.basis.t()) if weight.is_right else (local(weight.basis), low)
        residual = torch.addmm(grad, left, right, alpha=-self._config.scale)
        # Empty shards are not worth compiling.
        measure = self._measure if residual.numel() else factors_and_square
        return measure(residual, low, projected.direction, dim=1 if weight.is_right else 0)

    def _apply(
        self,
        weight: ProjectedWeight,
        projected: Projected,
        scaling: Tensor,
        step_size: float,
        decay_factor: float,
    ) -> None:
        """Updates the weight: scaling (G - scale R Q^T) + scale N Q^T is
        scaling G + scale (N - scaling R) Q^T.

        Args:
            scaling: phi / limiter.
        """
        parameter = local(weight.parameter)
        if decay_factor != 1:
            parameter.mul_(decay_factor)
        parameter.addcmul_(weight.local_grad, scaling, value=-step_size)
        low = torch.addcmul(projected.direction, projected.low_rank_grad, scaling, value=-1)
        left, right = (low, weight.basis.t()) if weight.is_right else (local(weight.basis), low)
        parameter.addmm_(left, right, alpha=-step_size * self._config.scale)


def factors_and_square(
    residual: Tensor, low_rank_grad: Tensor, direction: Tensor, *, dim: int
) -> tuple[Tensor, Tensor]:
    """Returns phi = ||N|| / ||R|| along `dim`, which is kept, and the sum of squares of phi times
    `residual`.

    Args:
        residual: G - scale R Q^T, [out/ranks, in].
    """
    norms = torch.linalg.vector_norm(low_rank_grad, dim=dim, keepdim=True) + TINY_NORM
    factors = torch.linalg.vector_norm(direction, dim=dim, keepdim=True) / norms
    return factors, (residual * factors).square().sum()

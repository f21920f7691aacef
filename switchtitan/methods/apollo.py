"""APOLLO: the gradient, scaled as by Adam in a random subspace (arXiv 2412.05270)."""

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from switchtitan.distributed.compilation import compile_if
from switchtitan.distributed.host_copies import to_device
from switchtitan.distributed.norms import sum_packed
from switchtitan.distributed.seeds import generator_for
from switchtitan.distributed.shards import copy_from_full_, local, shard_group
from switchtitan.methods.projected import (
    TINY_NORM,
    NormGrowthLimiter,
    PackedRows,
    ProjectedConfig,
    ProjectedMethod,
    ProjectedWeight,
    direction_,
    project,
)
from switchtitan.optim import AdamWConfig


class ApolloConfig(ProjectedConfig):
    """`[method] name = "apollo"`: APOLLO (arXiv 2412.05270). APOLLO-Mini is rank 1, scaling
    "tensor" and scale sqrt(128). Moments of projected gradients are in fp32 with every `[optimizer]
    moments_dtype`."""

    name: Literal["apollo"] = "apollo"
    """The method."""
    scaling: Literal["channel", "tensor"] = "channel"
    """One scaling factor for each row or column of a weight, along its larger dimension
    (`channel`), or for each weight (`tensor`)."""
    scale: float = Field(default=1.0, gt=0)
    """Updates of the projected weights are multiplied by this (alpha in the paper), above 0. The
    authors' code takes its square."""
    max_norm_growth: float = Field(default=1.01, gt=1)
    """Largest factor, above 1, by which the norm of a weight's update may grow in a step (gamma in
    the paper)."""


class Apollo(ProjectedMethod[ApolloConfig]):
    """Trains all weights; the optimizer state of the targeted ones is that of a random
    projection."""

    def build_rule(
        self, adamw: AdamWConfig, weights: list[ProjectedWeight], compile_step: bool
    ) -> "ApolloRule":
        return ApolloRule(self.config, adamw, weights, self.seed, compile_step)


class ApolloRule:
    """W <- decay_factor W - step_size scale (s G) / limiter (arXiv 2412.05270, Alg. 1).

    s = ||N|| / ||R|| over each channel or the tensor, N = M / (sqrt(V) + eps), with Adam's moments
    M, V of R = G Q and a random Q. The limiter keeps ||s G|| below `max_norm_growth` times its
    limited value in the step before (Fira, arXiv 2410.01623); the first step is not limited. As in
    the authors' code, eps is added to the root of the second moment before the bias correction,
    which is part of the step size and not of s; moments are kept when the basis changes. Weight
    decay is that of AdamW (arXiv 1711.05101), before the update.

    On several ranks, a step has up to two collectives for all weights: a reduce-scatter of R for
    weights with out < in, and a sum of squares. Bases follow from (seed, name, number of the
    basis), so no checkpoint has them. They are kept in memory, since drawing them takes longer than
    a step.

    Args:
        seed: the job's seed.
        compile_step: fuse the update of the moments with the norms.
    """

    def __init__(
        self,
        config: ApolloConfig,
        adam: AdamWConfig,
        weights: list[ProjectedWeight],
        seed: int,
        compile_step: bool,
    ) -> None:
        self._config, self._adam, self._weights, self._seed = config, adam, weights, seed
        self._left = [weight for weight in weights if not weight.is_right]
        self._rows = PackedRows([weight.exp_avg for weight in self._left])
        first = weights[0].parameter
        self._group = shard_group(first)
        self._limiter = NormGrowthLimiter(len(weights), config.max_norm_growth, local(first))
        self._drawn: int | None = None
        self._measure: Callable[..., Tensor] = compile_if(compile_step)(advance_and_measure_)

    def update(self, step: int, step_size: float, decay_factor: float) -> None:
        """See `projected.optimizer.UpdateRule`."""
        self._draw_bases(step // self._config.update_interval)
        factors, update_squares = zip(*self._factors_and_squares(), strict=True)
        limiters = self._limiter.divisors(torch.stack(update_squares).sqrt())
        for weight, factor, limiter in zip(self._weights, factors, limiters.unbind(), strict=True):
            scaling = factor.unsqueeze(1 if weight.is_right else 0)
            coefficients = scaling * (step_size * self._config.scale) / limiter
            parameter = local(weight.parameter)
            if decay_factor != 1:
                parameter.mul_(decay_factor)
            parameter.addcmul_(weight.local_grad, coefficients, value=-1)

    def metrics(self) -> dict[str, float]:
        return self._limiter.metrics()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the norms of the last updates; bases are drawn again."""
        return self._limiter.state_dict()

    def _draw_bases(self, number: int) -> None:
        """Draws the `number`-th basis of each weight, normal with variance 1 / rank."""
        if number == self._drawn:
            return
        for weight in self._weights:
            generator = generator_for(self._seed, f"{weight.name}.basis.{number}")
            values = (
                torch.randn(weight.basis.shape, generator=generator) / weight.basis.shape[1] ** 0.5
            )
            copy_from_full_(weight.basis, to_device(values, weight.basis.device))
        self._drawn = number

    def _factors_and_squares(self) -> list[tuple[Tensor, Tensor]]:
        """Returns per weight the local s, [channels] or [1], and the global ||s G||^2, 0-dim."""
        sums = iter(self._rows.sum_and_scatter([project(weight) for weight in self._left]))
        measured = [
            self._advance_and_measure(weight, project(weight) if weight.is_right else next(sums))
            for weight in self._weights
        ]
        # A channel projected on the right is on one rank: only squares are summed over ranks.
        own = {
            index: _factors(squares)
            for index, (weight, squares) in enumerate(zip(self._weights, measured, strict=True))
            if weight.is_right and self._config.scaling == "channel"
        }
        summed = sum_packed(
            [own[index][1] if index in own else squares for index, squares in enumerate(measured)],
            self._group,
        )
        return [
            (own[index][0], total) if index in own else _factors(total)
            for index, total in enumerate(summed)
        ]

    def _advance_and_measure(self, weight: ProjectedWeight, low_rank_grad: Tensor) -> Tensor:
        grad = weight.local_grad
        # Empty shards are not worth compiling.
        is_empty = low_rank_grad.numel() == 0 or grad.numel() == 0
        measure = advance_and_measure_ if is_empty else self._measure
        beta1, beta2 = self._adam.betas
        return measure(
            grad,
            low_rank_grad,
            local(weight.exp_avg),
            local(weight.exp_avg_sq),
            dims=(0, 1) if self._config.scaling == "tensor" else (1,) if weight.is_right else (0,),
            beta1=beta1,
            beta2=beta2,
            eps=self._adam.eps,
        )


def advance_and_measure_(
    grad: Tensor,
    low_rank_grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    dims: tuple[int, ...],
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    """Updates the moments in place; returns sums of squares over `dims` of N, R and G.

    Returns:
        [3, channels] or [3, 1].

    Args:
        grad: G, [out/ranks, in].
        low_rank_grad, exp_avg, exp_avg_sq: R and its moments, this rank's rows.
    """
    direction = direction_(low_rank_grad, exp_avg, exp_avg_sq, beta1=beta1, beta2=beta2, eps=eps)
    return torch.stack(
        [matrix.square().sum(dims).reshape(-1) for matrix in (direction, low_rank_grad, grad)]
    )


def _factors(squares: Tensor) -> tuple[Tensor, Tensor]:
    """Returns s, [channels], and ||s G||^2, 0-dim, from the sums of squares of N, R and G."""
    direction, low_rank_grad, grad = squares
    factors = direction.sqrt() / (low_rank_grad.sqrt() + TINY_NORM)
    return factors, (factors.square() * grad).sum()

"""APOLLO: the gradient itself, scaled as Adam would scale it in a random subspace (arXiv 2412.05270)."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from switchtitan.contracts import LanguageModel, Method, OptimizerConfig, TrainingOptimizer
from switchtitan.distributed.seeds import generator_for
from switchtitan.distributed.shards import copy_from_full_, local, shard_group
from switchtitan.methods.projected import (
    PackedRows,
    ProjectedConfig,
    ProjectedWeight,
    build_projected_optimizer,
    project,
    sum_packed,
)
from switchtitan.optim import AdamWConfig, require_adamw

_TINY_NORM = 1e-8
"""Added to norms that others are divided by, as in the authors' code."""


class ApolloConfig(ProjectedConfig):
    """`[method] name = "apollo"`: APOLLO (arXiv 2412.05270); its Mini is rank 1, scaling "tensor" and scale sqrt(128)."""

    name: Literal["apollo"] = "apollo"
    """The method."""
    scaling: Literal["channel", "tensor"] = "channel"
    """What has a scaling factor of its own: each row or column of a weight, along its larger dimension, or the weight."""
    scale: float = Field(default=1.0, gt=0)
    """Updates of the projected weights are multiplied by this (alpha in the paper), above 0; the authors' code takes its
    square."""
    max_norm_growth: float = Field(default=1.01, gt=1)
    """A weight's update is scaled down where its norm exceeds that of the step before by more than this factor (gamma in the
    paper), above 1."""


class Apollo(Method[ApolloConfig]):
    """All weights train; the largest ones' state is that of a small random projection."""

    def build_optimizer(
        self, model: LanguageModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        adamw = require_adamw(config)
        build_rule = partial(
            ApolloRule, self.config, adamw, seed=self.seed, compile_step=compile_step
        )
        return build_projected_optimizer(model, self.config, adamw, build_rule)


class ApolloRule:
    """W <- kept W - step_size scale (s G) / limiter (arXiv 2412.05270, Alg. 1).

    s = ||N|| / ||R|| over each channel or the tensor, N = M / (sqrt(V) + eps), with Adam's moments M, V of R = G Q and a
    random Q. The limiter keeps ||s G|| below `max_norm_growth` times what it was, limited, in the step before (Fira, arXiv
    2410.01623); the first step is free. As in the authors' code, eps is added to the root of the second moment before the
    bias correction, which is part of the step size and not of s; moments are kept when the basis changes. Weight decay is
    that of AdamW (arXiv 1711.05101), before the update.

    Several ranks have up to two collectives a step, for all weights: the sum of R for weights with out < in, scattered over the
    ranks, which hold the moments' rows; and squares of norms. Bases follow from (seed, name, number of the basis); so they are
    in no checkpoint, but in memory, since drawing them anew would take longer than the step.

    Args:
        seed: of the job.
        compile_step: fuse the moments' update with the norms.
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
        # The first step's norm is not limited by one before it.
        self._update_norms = torch.full(
            (len(weights),), torch.inf, dtype=first.dtype, device=local(first).device
        )
        self._num_limited = torch.zeros((), device=local(first).device)
        self._drawn: int | None = None
        self._measure: Callable[..., Tensor] = (
            torch.compile(advance_and_measure_, fullgraph=True, dynamic=False)
            if compile_step
            else advance_and_measure_
        )

    def update_(self, step: int, step_size: float, kept: float) -> None:
        """See `projected.optimizer.UpdateRule`."""
        self._draw_bases_(step // self._config.update_interval)
        factors, update_squares = zip(*self._factors_and_squares(), strict=True)
        limiters = self._limiters_(torch.stack(update_squares).sqrt())
        for weight, factor, limiter in zip(self._weights, factors, limiters.unbind(), strict=True):
            beside = factor.unsqueeze(1 if weight.is_right else 0)
            coefficients = beside * (step_size * self._config.scale) / limiter
            parameter = local(weight.parameter)
            if kept != 1:
                parameter.mul_(kept)
            parameter.addcmul_(weight.local_grad, coefficients, value=-1)

    def metrics(self) -> dict[str, float]:
        """The share of weights whose update the limiter held back in the last step."""
        return {"projection/limited_share": float(self._num_limited) / len(self._weights)}

    def state_dict(self) -> dict[str, Tensor]:
        """`projection.update_norms`: [weights], each update's norm in the last step, infinite before the first."""
        return {"projection.update_norms": self._update_norms}

    def _draw_bases_(self, number: int) -> None:
        """Sets all bases to the `number`-th ones, normal with variance 1 / rank, if they are others."""
        if number == self._drawn:
            return
        for weight in self._weights:
            generator = generator_for(self._seed, f"{weight.name}.basis.{number}")
            values = (
                torch.randn(weight.basis.shape, generator=generator) / weight.basis.shape[1] ** 0.5
            )
            copy_from_full_(weight.basis, values)
        self._drawn = number

    def _factors_and_squares(self) -> list[tuple[Tensor, Tensor]]:
        """For each weight: s of this rank's part, [channels] or [1], and ||s G||^2 over all ranks, 0-dim."""
        sums = iter(self._rows.sum_and_scatter([project(weight) for weight in self._left]))
        measured = [
            self._measure_(weight, project(weight) if weight.is_right else next(sums))
            for weight in self._weights
        ]
        # A row that is projected on the right lies on one rank, and so does its factor: only squares are left to be added up.
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

    def _measure_(self, weight: ProjectedWeight, low_rank_grad: Tensor) -> Tensor:
        grad = weight.local_grad
        # A compiler gains nothing where there is nothing.
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

    def _limiters_(self, norms: Tensor) -> Tensor:
        """What to divide each update by, [weights], given the norms; remembers the norms that come of it."""
        limit = self._config.max_norm_growth
        limiters = (norms / (self._update_norms + _TINY_NORM)).clamp(min=limit) / limit
        self._update_norms.copy_(norms / limiters)
        self._num_limited = (limiters > 1).sum()
        return limiters


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
    """Updates Adam's moments in place and returns sums of squares over `dims` of N, R and G, [3, channels] or [3, 1].

    Args:
        grad: G, [out/ranks, in].
        low_rank_grad, exp_avg, exp_avg_sq: R and its moments, this rank's rows.
    """
    exp_avg.lerp_(low_rank_grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(low_rank_grad, low_rank_grad, value=1 - beta2)
    direction = exp_avg / (exp_avg_sq.sqrt() + eps)
    return torch.stack(
        [matrix.square().sum(dims).reshape(-1) for matrix in (direction, low_rank_grad, grad)]
    )


def _factors(squares: Tensor) -> tuple[Tensor, Tensor]:
    """s, [channels], and ||s G||^2, 0-dim, from [3, channels] sums of squares of N, R and G."""
    direction, low_rank_grad, grad = squares
    factors = direction.sqrt() / (low_rank_grad.sqrt() + _TINY_NORM)
    return factors, (factors.square() * grad).sum()

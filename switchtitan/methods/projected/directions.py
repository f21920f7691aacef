"""Adam's directions from projected gradients."""

from collections.abc import Callable

from torch import Tensor

from switchtitan.distributed.compilation import compile_if
from switchtitan.distributed.shards import local
from switchtitan.methods.projected.weights import ProjectedWeight
from switchtitan.optim import AdamWConfig


class AdamDirections:
    """Computes N = M / (sqrt(V) + eps) with the moments M, V of projected gradients R.

    As in the code of GaLore's and Fira's authors, eps is added to the root of the second moment
    before the bias correction, which is part of the step size.

    Args:
        compile_step: fuse the elementwise operations.
    """

    def __init__(self, adam: AdamWConfig, compile_step: bool) -> None:
        self._adam = adam
        self._direction: Callable[..., Tensor] = compile_if(compile_step)(direction_)

    def advance(self, weight: ProjectedWeight, low_rank_grad: Tensor) -> Tensor:
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

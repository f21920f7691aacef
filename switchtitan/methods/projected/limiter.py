"""The norm-growth limiter of Fira (arXiv 2410.01623), which APOLLO uses as well."""

import torch
from torch import Tensor

TINY_NORM = 1e-8
"""Added to norms in denominators, as in the code of Fira's and APOLLO's authors."""


class NormGrowthLimiter:
    """Keeps the norm of each weight's update below a multiple of its limited value in the step
    before. The first step is not limited.

    Args:
        num_weights: number of updates in a step.
        max_norm_growth: the multiple, above 1.
        like: a tensor with the dtype and device of the norms.
    """

    def __init__(self, num_weights: int, max_norm_growth: float, like: Tensor) -> None:
        self._max_norm_growth = max_norm_growth
        self._norms = torch.full((num_weights,), torch.inf, dtype=like.dtype, device=like.device)
        self._num_limited = torch.zeros((), device=like.device)

    def divisors(self, norms: Tensor) -> Tensor:
        """Returns the divisor of each update, [weights], and stores the limited norms.

        Args:
            norms: [weights], of the updates, before they are limited.
        """
        limit = self._max_norm_growth
        divisors = (norms / (self._norms + TINY_NORM)).clamp(min=limit) / limit
        self._norms.copy_(norms / divisors)
        self._num_limited = (divisors > 1).sum()
        return divisors

    def metrics(self) -> dict[str, float]:
        """Returns the fraction of weights whose update was limited in the last step."""
        return {"projection/limited_share": float(self._num_limited) / len(self._norms)}

    def state_dict(self) -> dict[str, Tensor]:
        """Returns `projection.update_norms`, [weights]: the last updates' norms, initially inf."""
        return {"projection.update_norms": self._norms}

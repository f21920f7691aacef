"""GaLore: Adam in the subspace of each gradient's leading singular vectors (arXiv 2403.03507)."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from switchtitan.distributed.shards import local
from switchtitan.methods.projected import (
    AdamDirections,
    PackedRows,
    ProjectedConfig,
    ProjectedMethod,
    ProjectedWeight,
    project,
    refresh_bases_,
)
from switchtitan.optim import AdamWConfig


class GaloreConfig(ProjectedConfig):
    """`[method] name = "galore"`: GaLore (arXiv 2403.03507). On a GPU, the host waits for torch's
    decompositions when bases are renewed, every `update_interval` steps. They run in fp64,
    slow on GPUs that compute it at 1/64 of the rate of fp32; a larger interval means fewer. Moments
    of projected gradients are in fp32 with every `[optimizer] moments_dtype`."""

    name: Literal["galore"] = "galore"
    """The method."""
    scale: float = Field(default=0.25, gt=0)
    """Updates of the projected weights are multiplied by this (alpha in the paper), above 0."""


class Galore(ProjectedMethod[GaloreConfig]):
    """Trains all weights; the optimizer state of the targeted ones is low-rank."""

    def build_rule(
        self, adamw: AdamWConfig, weights: list[ProjectedWeight], compile_step: bool
    ) -> "GaloreRule":
        return GaloreRule(self.config, adamw, weights, compile_step)


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
        self._config, self._weights = config, weights
        self._right = [weight for weight in weights if weight.is_right]
        self._left = [weight for weight in weights if not weight.is_right]
        self._rows = PackedRows([weight.exp_avg for weight in self._left])
        self._directions = AdamDirections(adam, compile_step)

    def update(self, step: int, step_size: float, decay_factor: float) -> None:
        """See `projected.optimizer.UpdateRule`."""
        if step % self._config.update_interval == 0:
            refresh_bases_(self._weights)
        coefficient = -step_size * self._config.scale
        if self._left:
            sums = self._rows.sum_and_scatter([project(weight) for weight in self._left])
            parts = [
                self._directions.advance(weight, low)
                for weight, low in zip(self._left, sums, strict=True)
            ]
            for weight, direction in zip(self._left, self._rows.gather(parts), strict=True):
                local(weight.parameter).addmm_(
                    local(weight.basis), direction, beta=decay_factor, alpha=coefficient
                )
        for weight in self._right:
            direction = self._directions.advance(weight, project(weight))
            local(weight.parameter).addmm_(
                direction, weight.basis.t(), beta=decay_factor, alpha=coefficient
            )

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Returns `<weight>.basis`, which is kept for many steps and cannot be recomputed."""
        return {f"{weight.name}.basis": weight.basis for weight in self._weights}

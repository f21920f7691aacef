"""AdamW with a step count of its own for every vector of the factors."""

from collections.abc import Callable

import torch
from torch import Tensor

from switchtitan.distributed.shards import local, row_range
from switchtitan.methods.lowrank import LowRankLinear
from switchtitan.methods.switchlora.freeze import SIDE_A, SIDE_B, VectorRun
from switchtitan.optim import AdamWConfig

Update = Callable[..., None]


class VectorAdamW:
    """AdamW on A and B of all layers; bias corrections count each vector's own steps (SwitchLoRA, arXiv 2406.06564, sec. 3).

    Equals torch's AdamW as long as no vector is reset or held still.

    Args:
        layers: by qualified name, all of one rank.
        compile_step: fuse the update of a factor into one kernel.

    Attributes:
        num_steps: [2, layers, rank] fp32, updates that each vector has seen, frozen ones included; the same on every rank.
    """

    def __init__(self, config: AdamWConfig, layers: dict[str, LowRankLinear], compile_step: bool) -> None:
        self._config = config
        factors = [layer.lora_a for layer in layers.values()], [layer.lora_b for layer in layers.values()]
        self._names = (
            [f"{name}.lora_a" for name in layers],
            [f"{name}.lora_b" for name in layers],
        )
        self._factors = factors
        self._exp_avg = tuple([torch.zeros_like(p, requires_grad=False) for p in side] for side in factors)
        self._exp_avg_sq = tuple([torch.zeros_like(p, requires_grad=False) for p in side] for side in factors)
        first = factors[0][0]
        self.num_steps = torch.zeros(2, len(layers), first.shape[0], device=first.device)
        # A tensor: a compiled update would be compiled anew for every Python number.
        self._lr = torch.tensor(config.lr, dtype=first.dtype, device=first.device)
        self._update: Update = (
            torch.compile(update_vectors_, fullgraph=True, dynamic=False) if compile_step else update_vectors_
        )

    def set_lr(self, lr_factor: float) -> None:
        self._lr.fill_(self._config.lr * lr_factor)

    @torch.no_grad()
    def reset_(self, runs: list[VectorRun]) -> None:
        """Forgets what these vectors' moments and step counts hold."""
        entries = [run.view(self.num_steps) for run in runs]
        for run in runs:
            for moments in (self._exp_avg, self._exp_avg_sq):
                entries.append(_local_vectors(moments[run.side][run.layer], run))
        if entries:
            torch._foreach_zero_(entries)

    @torch.no_grad()
    def step(self, moving: Tensor) -> None:
        """Updates every vector.

        Args:
            moving: [2, layers, rank] bool; a vector where it is false gets a gradient of zero and does not move at all, weight
                decay included, while its step count goes on.
        """
        beta1, beta2 = self._config.betas
        self.num_steps += 1
        num_steps = self.num_steps.to(self._lr.dtype)
        step_sizes = torch.where(moving, self._lr / (1 - beta1**num_steps), 0)
        root_corrections = (1 - beta2**num_steps).sqrt()
        kept = 1 - self._lr * self._config.weight_decay * moving
        for side, factors in enumerate(self._factors):
            for layer, factor in enumerate(factors):
                parameter = local(factor)
                if parameter.numel() == 0:
                    continue
                assert factor.grad is not None, f"no gradient for {self._names[side][layer]}"
                self._update(
                    parameter,
                    local(factor.grad),
                    local(self._exp_avg[side][layer]),
                    local(self._exp_avg_sq[side][layer]),
                    *(
                        _beside(table[side, layer], factor, side)
                        for table in (moving, step_sizes, root_corrections, kept)
                    ),
                    beta1=beta1,
                    beta2=beta2,
                    eps=self._config.eps,
                )

    def zero_grad(self) -> None:
        for factors in self._factors:
            for factor in factors:
                factor.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """`<layer>.lora_a.exp_avg` and so on, like the factors."""
        return {
            f"{name}.{key}": tensor
            for side in (SIDE_A, SIDE_B)
            for key, moments in (("exp_avg", self._exp_avg), ("exp_avg_sq", self._exp_avg_sq))
            for name, tensor in zip(self._names[side], moments[side], strict=True)
        }


def update_vectors_(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    moving: Tensor,
    step_sizes: Tensor,
    root_corrections: Tensor,
    kept: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One AdamW update (arXiv 1711.05101, Algorithm 2) with coefficients for each vector.

    Args:
        parameter, exp_avg, exp_avg_sq: [rank, in] for A, [out, rank] for B, or a shard; changed in place.
        moving: bool; [rank, 1] for A, [1, rank] for B, as are all coefficients.
        step_sizes: lr / (1 - beta1^n), zero where frozen.
        root_corrections: sqrt(1 - beta2^n).
        kept: 1 - lr * weight_decay, 1 where frozen.
    """
    grad = torch.where(moving, grad, 0)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    parameter.mul_(kept).sub_(step_sizes * exp_avg / (exp_avg_sq.sqrt() / root_corrections + eps))


def _beside(coefficients: Tensor, factor: Tensor, side: int) -> Tensor:
    """Coefficients [rank] shaped to broadcast over this rank's part of a factor."""
    if side == SIDE_B:
        return coefficients.unsqueeze(0)
    held = row_range(factor)
    return coefficients[held.start : held.stop].unsqueeze(1)


def _local_vectors(moments: Tensor, run: VectorRun) -> Tensor:
    """The vectors of a run in this rank's part, a view; empty where it holds none."""
    part = local(moments)
    if run.side == SIDE_B:
        return part[:, run.vectors.start : run.vectors.stop]
    held = row_range(moments)
    start = min(max(run.vectors.start - held.start, 0), len(held))
    stop = min(max(run.vectors.stop - held.start, 0), len(held))
    return part[start:stop]

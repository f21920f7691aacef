"""An optimizer that updates some weights from projected gradients, and the others by AdamW."""

from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from switchtitan.contracts import TrainingOptimizer, replicated_values
from switchtitan.distributed.shards import local, rows_per_rank, shard_group
from switchtitan.methods.projected.weights import ProjectedWeight
from switchtitan.optim import AdamWConfig
from switchtitan.regions import region


class UpdateRule(Protocol):
    """How a method updates the projected weights."""

    def update(self, step: int, step_size: float, decay_factor: float) -> None:
        """Updates all weights from their gradients, and the bases every `update_interval` steps.

        Args:
            step: steps done before.
            step_size: lr sqrt(1 - beta2^n) / (1 - beta1^n) at the n-th step: Adam's bias correction
                as at the end of sec. 2 of arXiv 1412.6980, with eps added to the uncorrected root.
            decay_factor: 1 - lr * weight_decay, by which weights are multiplied.
        """
        ...

    def metrics(self) -> dict[str, float]: ...

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the rule's live tensors other than moments; they are loaded in place."""
        ...


class ProjectedOptimizer:
    """An update rule for projected weights, and an optimizer for all other parameters.

    A `contracts.TrainingOptimizer`.

    Args:
        weights: the projected weights, which `rule` updates.
        dense: the optimizer of the other parameters.
        update_interval: steps between two bases.
    """

    def __init__(
        self,
        config: AdamWConfig,
        weights: list[ProjectedWeight],
        rule: UpdateRule,
        dense: TrainingOptimizer,
        update_interval: int,
    ) -> None:
        self._config, self._weights, self._rule, self._dense = config, weights, rule, dense
        self._update_interval = update_interval
        self._num_steps = 0
        # A Python number, passed to kernels as an argument: no synchronization.
        self._lr = config.lr

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter."""
        (beta1, beta2), num_steps = self._config.betas, self._num_steps + 1
        self._rule.update(
            self._num_steps,
            step_size=self._lr * (1 - beta2**num_steps) ** 0.5 / (1 - beta1**num_steps),
            decay_factor=1 - self._lr * self._config.weight_decay,
        )
        self._num_steps = num_steps
        self._dense.step()

    def zero_grad(self) -> None:
        for weight in self._weights:
            weight.parameter.grad = None
        self._dense.zero_grad()

    def set_lr(self, lr_factor: float) -> None:
        self._lr = self._config.lr * lr_factor
        self._dense.set_lr(lr_factor)

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of both parts and the number of bases computed so far."""
        num_refreshes = -(-self._num_steps // self._update_interval)
        return {
            **self._dense.metrics(),
            "projection/refreshes": float(num_refreshes),
            **self._rule.metrics(),
        }

    def replicated(self) -> dict[str, Tensor]:
        """Returns the bases, also those that are drawn again after a resume; see
        `contracts.HoldsReplicated`."""
        bases = {f"{weight.name}.basis": weight.basis for weight in self._weights}
        return replicated_values(self._dense) | bases

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the state of both parts, `<weight>.exp_avg`, `.exp_avg_sq` and
        `projection.step`."""
        moments = {
            f"{weight.name}.{key}": tensor
            for weight in self._weights
            for key, tensor in (("exp_avg", weight.exp_avg), ("exp_avg_sq", weight.exp_avg_sq))
        }
        step = {"projection.step": torch.tensor(self._num_steps)}
        return self._dense.state_dict() | moments | self._rule.state_dict() | step

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for key, tensor in self.state_dict().items():
            tensor.copy_(state[key])
        self._num_steps = int(state["projection.step"])


class PackedRows:
    """Reduce-scatters and all-gathers the rows of several matrices, in one collective each.

    Together they send as much as one all-reduce, while moments and other state of the rows are
    sharded. On one rank nothing is sent or copied.

    Args:
        matrices: [rows, width] each, the layout of the rows: all plain, or all sharded along
            dimension 0 over the same ranks.
    """

    def __init__(self, matrices: list[Tensor]) -> None:
        self._group = shard_group(matrices[0]) if matrices else None
        self._num_ranks = 1 if self._group is None else self._group.size()
        self._shapes = [tuple(matrix.shape) for matrix in matrices]
        self._held = [local(matrix).shape[0] for matrix in matrices]
        # The last ranks are padded.
        self._rows_per_rank = [rows_per_rank(rows, self._num_ranks) for rows, _ in self._shapes]
        self._sizes = [
            rows * width for rows, (_, width) in zip(self._rows_per_rank, self._shapes, strict=True)
        ]

    def sum_and_scatter(self, partials: list[Tensor]) -> list[Tensor]:
        """Returns this rank's rows of each matrix, summed over ranks.

        Args:
            partials: [rows, width] each, this rank's summand.
        """
        if self._group is None:
            return partials
        with region("reduce"):
            return self._sum_and_scatter(partials)

    def _sum_and_scatter(self, partials: list[Tensor]) -> list[Tensor]:
        packed = partials[0].new_empty(self._num_ranks, sum(self._sizes))
        for partial, block in zip(partials, self._blocks(packed), strict=True):
            padding = block.shape[0] * block.shape[1] - partial.shape[0]
            block.copy_(F.pad(partial, (0, 0, 0, padding)).view(block.shape))
        own = torch.empty_like(packed[0])
        # NCCL's collectives on lists copy them.
        dist.reduce_scatter_single(own, packed.view(-1), group=self._group)
        blocks = self._blocks(own.unsqueeze(0))
        return [block[0, :held] for block, held in zip(blocks, self._held, strict=True)]

    def gather(self, parts: list[Tensor]) -> list[Tensor]:
        """Returns each full matrix, on every rank.

        Args:
            parts: this rank's rows of each.
        """
        if self._group is None:
            return parts
        own = parts[0].new_zeros(sum(self._sizes))
        for part, block in zip(parts, self._blocks(own.unsqueeze(0)), strict=True):
            block[0, : part.shape[0]] = part
        packed = own.new_empty(self._num_ranks, own.numel())
        dist.all_gather_single(packed.view(-1), own, group=self._group)
        return [
            block.flatten(0, 1)[: shape[0]]
            for block, shape in zip(self._blocks(packed), self._shapes, strict=True)
        ]

    def _blocks(self, packed: Tensor) -> list[Tensor]:
        """Returns a view [ranks, rows/ranks, width] of each matrix in `packed` [ranks, all
        sizes]."""
        return [
            part.unflatten(1, (rows, width))
            for part, rows, (_, width) in zip(
                packed.split(self._sizes, dim=1), self._rows_per_rank, self._shapes, strict=True
            )
        ]

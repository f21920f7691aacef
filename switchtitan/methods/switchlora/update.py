"""The rules that update the vectors of all layers' factors: AdamW and Muon."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from switchtitan.distributed.blocks import compile_if
from switchtitan.distributed.copies import to_device
from switchtitan.distributed.rows import copy_all_
from switchtitan.distributed.shards import allocate_adjacent, as_one_matrix, local_shards, row_range
from switchtitan.methods.lowrank.linear import FACTORS, LowRankLinear
from switchtitan.methods.switchlora.plan import Plan, VectorSpan, vector_spans
from switchtitan.optim.adamw import AdamWConfig
from switchtitan.optim.base import GroupedOptimizer
from switchtitan.optim.muon import Muon, MuonConfig
from switchtitan.optim.parameters import TrainedParameter

_ELEMENTS_PER_CALL = 2**25
"""The most elements of several factors that one call updates: gradients are copied next to each
other, which takes 128 MiB for so many."""
_ELEMENTS_IN_CACHE = 2**16
"""Elements that a CPU updates at a time if nothing is compiled: they stay in its cache. For 10
million elements at a time, an update takes six times as long."""


class Factors:
    """A of all layers, then B of all layers, as in a flattened table [2, layers, rank].

    Attributes:
        trained, parameters: all factors.
        held: the rows of each factor that this rank holds.
    """

    def __init__(
        self, layers: Mapping[str, LowRankLinear], compute_dtype: torch.dtype = torch.float32
    ) -> None:
        self.trained = [
            TrainedParameter(f"{name}.{key}", layer.get_parameter(key), compute_dtype=compute_dtype)
            for key in FACTORS
            for name, layer in layers.items()
        ]
        self.parameters = [entry.parameter for entry in self.trained]
        self.held = row_range(self.parameters[0])
        self._num_layers = len(layers)

    def groups(self) -> list[list[int]]:
        """Returns indices of factors of one width, A and B of each layer in turn. Groups of one
        width have one size, so that they share a compiled graph."""
        of_width: dict[int, list[int]] = {}
        for layer in range(self._num_layers):
            for factor in (layer, self._num_layers + layer):
                of_width.setdefault(self.parameters[factor].shape[1], []).append(factor)
        groups = []
        for width, factors in of_width.items():
            limit = max(1, _ELEMENTS_PER_CALL // max(1, len(self.held) * width))
            most = min(limit, len(factors))
            size = next(n for n in range(most, 0, -1) if len(factors) % n == 0)
            groups += [factors[first : first + size] for first in range(0, len(factors), size)]
        return groups

    def gradients(self) -> list[Tensor]:
        grads = [p.grad for p in self.parameters if p.grad is not None]
        assert len(grads) == len(self.parameters), "a factor has no gradient"
        return grads

    def views(self, spans: list[VectorSpan], *states: Sequence[Tensor]) -> list[Tensor]:
        """Returns this rank's rows of these vectors, of tensors sharded like the factors."""
        first, views = self.held.start, []
        for shards in map(local_shards, states):
            for factor, layer, vectors in spans:
                start, stop = max(vectors.start, first), min(vectors.stop, self.held.stop)
                if start < stop:
                    shard = shards[factor * self._num_layers + layer]
                    views.append(shard[start - first : stop - first])
        return views

    def zero_(self, spans: list[VectorSpan], *states: Sequence[Tensor]) -> None:
        """Zeroes these vectors."""
        if views := self.views(spans, *states):
            torch._foreach_zero_(views)


class VectorAdamW(GroupedOptimizer):
    """AdamW on A and B of all layers, with bias corrections from each vector's own step count
    (SwitchLoRA, arXiv 2406.06564, sec. 3).

    Equals torch's AdamW as long as no vector is reset or frozen. Factors of one group are updated
    as one matrix; they are copied if their local shards do not follow each other in memory.
    """

    def __init__(
        self, config: AdamWConfig, factors: Factors, plan: Plan, compile_step: bool
    ) -> None:
        super().__init__(config, factors.trained)
        self._keys, self._factors, self._plan = config, factors, plan
        self._groups = factors.groups()
        order = [factor for group in self._groups for factor in group]
        rank, held = factors.parameters[0].shape[0], factors.held
        # In a flattened table, of all local vectors in the order of groups.
        self._places = np.add.outer(np.multiply(order, rank), held).ravel()
        self._means, self._squares = self._zeros("exp_avg", order), self._zeros("exp_avg_sq", order)
        self._shards = local_shards(factors.parameters)
        tables = self._shards, local_shards(self._means), local_shards(self._squares)
        self._matrices = [
            [as_one_matrix([shards[i] for i in group]) for shards in tables]
            for group in self._groups
        ]
        first = factors.parameters[0]
        # Fake tensors stand for those of a GPU.
        in_blocks = not compile_step and first.device.type == "cpu" and not is_fake(first)
        self._update = compile_if(compile_step)(update_in_blocks_ if in_blocks else update_vectors_)

    def _zeros(self, moment: str, order: list[int]) -> list[Tensor]:
        """Returns a moment of each factor; local shards follow each other in memory in `order`."""
        parameters = self._factors.parameters
        allocated = allocate_adjacent([parameters[i] for i in order], parameters[0].device)
        zeros = [allocated[parameter] for parameter in parameters]
        torch._foreach_zero_(local_shards(zeros))
        for entry, of_factor in zip(self._factors.trained, zeros, strict=True):
            self.state[f"{entry.name}.{moment}"] = of_factor
        return zeros

    @torch.no_grad()
    def step(self) -> None:
        """Updates every vector. A frozen one has a gradient of zero and does not change, not even
        by weight decay; its step count still increases."""
        num_held = len(self._factors.held)
        if not num_held:
            return
        grads = local_shards(self._factors.gradients())
        sizes = [len(group) * num_held for group in self._groups]
        coefficients = self._coefficients().unsqueeze(2).split(sizes, dim=1)
        for group, of_table, of_group in zip(
            self._groups, self._matrices, coefficients, strict=True
        ):
            own, (matrix, *moments) = [self._shards[i] for i in group], of_table
            vectors = torch.cat(own) if matrix is None else matrix
            grad = torch.cat([grads[i] for i in group]) if len(group) > 1 else grads[group[0]]
            self._update(vectors, grad, *moments, *of_group, betas=self._keys.betas)
            if matrix is None:
                copy_all_(list(zip(own, vectors.split(num_held), strict=True)))

    def _coefficients(self) -> Tensor:
        """Returns mask, decay, step size and epsilon of each local vector, [4, vectors].

        After n steps, the step size is lr sqrt(1 - beta2^n) / (1 - beta1^n), with both bias
        corrections, and epsilon is eps sqrt(1 - beta2^n).
        """
        (beta1, beta2), (lr,) = self._keys.betas, self.rates
        first = self._factors.parameters[0]
        num_updates, is_frozen = (
            torch.from_numpy(table.ravel()[self._places]).to(first.dtype)
            for table in (self._plan.num_updates(), self._plan.is_frozen())
        )
        is_free = 1 - is_frozen
        root = (1 - beta2**num_updates).sqrt()
        step_size = lr * root / (1 - beta1**num_updates) * is_free
        decay = 1 - lr * is_free * self._keys.weight_decay
        table = torch.stack([is_free, decay, step_size, root * self._keys.eps])
        return to_device(table, first.device)

    @torch.no_grad()
    def reset(self) -> None:
        """Zeroes the moments, or the first ones alone, of the vectors that the plan resets."""
        only_momentum = self._plan.config.reset_moments == "momentum"
        states = (self._means,) if only_momentum else (self._means, self._squares)
        self._factors.zero_(self._plan.resets(), *states)


def update_vectors_(
    vectors: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mask: Tensor,
    decay: Tensor,
    step_size: Tensor,
    eps: Tensor,
    *,
    betas: tuple[float, float],
) -> None:
    """Updates vectors and moments [vectors, width] by AdamW (arXiv 1711.05101, Algorithm 2), with
    coefficients [vectors, 1]; bias corrections are part of the step size and eps."""
    grad = grad * mask
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    vectors.mul_(decay).addcdiv_(exp_avg * step_size, exp_avg_sq.sqrt().add_(eps), value=-1)


def update_in_blocks_(vectors: Tensor, *tensors: Tensor, betas: tuple[float, float]) -> None:
    """Does `update_vectors_` for a few vectors at a time."""
    num_vectors = max(1, _ELEMENTS_IN_CACHE // vectors.shape[1])
    for block in zip(*(part.split(num_vectors) for part in (vectors, *tensors)), strict=True):
        update_vectors_(*block, betas=betas)


class FactorMuon(Muon):
    """Muon on A and B of all layers, as matrices [rank, in] and [rank, out].

    A frozen vector is zero in the matrix that is orthogonalized, so that the other rows of the
    update are what they would be without it.
    """

    def __init__(
        self, config: MuonConfig, factors: Factors, plan: Plan, compile_step: bool
    ) -> None:
        super().__init__(config, factors.trained, compile_step)
        self._factors, self._plan = factors, plan
        self._means = [self.state[f"{entry.name}.momentum"] for entry in factors.trained]

    @torch.no_grad()
    def step(self) -> None:
        """Updates every vector that is not frozen; a frozen one keeps its value and momentum."""
        frozen = vector_spans(self._plan.is_frozen())
        kept = self._factors.views(frozen, self._factors.parameters, self._means)
        copies = [torch.empty_like(view) for view in kept]
        copy_all_(list(zip(copies, kept, strict=True)))
        self._factors.zero_(frozen, self._means, self._factors.gradients())
        super().step()
        copy_all_(list(zip(kept, copies, strict=True)))

    @torch.no_grad()
    def reset(self) -> None:
        """Zeroes the momentum, the only state, of the vectors that the plan resets."""
        self._factors.zero_(self._plan.resets(), self._means)

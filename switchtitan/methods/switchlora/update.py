"""The rules that update the vectors of all layers' factors: AdamW and Muon."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from switchtitan.distributed.blocks import compile_if
from switchtitan.distributed.copies import to_device
from switchtitan.distributed.rows import copy_all_
from switchtitan.distributed.shards import local, row_range
from switchtitan.methods.switchlora.plan import Plan, VectorSpan, vector_spans
from switchtitan.optim.adamw import AdamKeys
from switchtitan.optim.adamw8bit import MOMENTS, step_size_and_eps, update_
from switchtitan.optim.base import GroupedOptimizer
from switchtitan.optim.moments import Moments
from switchtitan.optim.muon import Muon, MuonKeys
from switchtitan.optim.parameters import TrainedParameter
from switchtitan.optim.weights import Weights

_FACTORS_PER_CALL = 8
"""Factors of one shape that one call updates. It would take minutes to compile it for all of them,
and a call for each takes the host more time than the update."""


class Factors:
    """A of all layers, then B of all layers, as in a flattened table [2, layers, rank]. `held`
    are the rows of each factor that this rank holds."""

    def __init__(self, trained: list[TrainedParameter]) -> None:
        self.trained = trained
        self.by_name = {entry.name: entry.parameter for entry in trained}
        self.parameters = list(self.by_name.values())
        self.held = row_range(self.parameters[0])

    def groups(self, size: int) -> list[list[int]]:
        """Returns indices of up to `size` factors of one width each."""
        by_width: dict[int, list[int]] = {}
        for factor, parameter in enumerate(self.parameters):
            by_width.setdefault(parameter.shape[1], []).append(factor)
        return [
            factors[first : first + size]
            for factors in by_width.values()
            for first in range(0, len(factors), size)
        ]

    def gradients(self) -> list[Tensor | None]:
        """Returns this rank's shards of the gradients; None for a factor that no loss reached."""
        return [None if p.grad is None else local(p.grad) for p in self.parameters]

    def views(self, spans: list[VectorSpan], *states: Sequence[Tensor | None]) -> list[Tensor]:
        """Returns this rank's rows of these vectors, of tensors sharded like the factors."""
        first, views = self.held.start, []
        for state in states:
            for factor, vectors in spans:
                start, stop = max(vectors.start, first), min(vectors.stop, self.held.stop)
                tensor = state[factor]
                if start < stop and tensor is not None:
                    views.append(local(tensor)[start - first : stop - first])
        return views

    def zero_(self, spans: list[VectorSpan], *states: Sequence[Tensor | None]) -> None:
        """Zeroes these vectors."""
        if views := self.views(spans, *states):
            torch._foreach_zero_(views)


class VectorAdamW(GroupedOptimizer):
    """AdamW on A and B of all layers, with bias corrections from each vector's own step count
    (SwitchLoRA, arXiv 2406.06564, sec. 3).

    Equals torch's AdamW as long as no vector is reset or frozen.
    """

    def __init__(self, config: AdamKeys, factors: Factors, plan: Plan, compile_step: bool) -> None:
        super().__init__(config, factors.trained)
        self._adam, self._factors, self._plan = config, factors, plan
        self._means, self._squares = (
            Moments(*moment, factors.by_name, config.has_8bit_moments) for moment in MOMENTS.items()
        )
        self.weights = Weights(factors.by_name, config.trains_bf16)
        self.state = self._means.state | self._squares.state | self.weights.state
        moments = (self._means, self._squares)
        self._moments: list[list[Any]] = [list(each.stored.values()) for each in moments]
        first = factors.parameters[0]
        # One after the other stays in a CPU's cache. Fake tensors stand for those of a GPU.
        is_alone = not compile_step and first.device.type == "cpu" and not is_fake(first)
        self._groups = factors.groups(1 if is_alone else _FACTORS_PER_CALL)
        self._update = compile_if(compile_step)(update_)

    @torch.no_grad()
    def step(self) -> None:
        """Updates every vector. A frozen one has a gradient of zero and does not change, not even
        by weight decay; its step count still increases. As in torch's AdamW, nothing of a factor
        without a gradient changes, but its vectors' step counts increase."""
        grads, groups = self._factors.gradients(), self._groups
        weights = self.weights.next()  # on every rank
        if any(grad is None for grad in grads):
            present = [[f for f in group if grads[f] is not None] for group in groups]
            groups = [group for group in present if group]
        if not groups or not self._factors.held:
            return
        tables: list[list[Any]] = [[*weights.values()], *self._moments, grads]
        coefficients = self._coefficients(groups).split([len(group) for group in groups])
        for group, rows in zip(groups, coefficients, strict=True):
            own = ([table[factor] for factor in group] for table in tables)
            self._update(*own, coefficients=rows, betas=self._adam.betas)

    def _coefficients(self, groups: list[list[int]]) -> Tensor:
        """Returns mask, decay, step size and epsilon of each local vector, [factors, 4, held, 1],
        with factors in the order of `groups`."""
        (lr,) = self.rates  # factors are one group
        first, held = self._factors.parameters[0], self._factors.held
        order = [factor for group in groups for factor in group]
        steps_since_reset, is_frozen = (
            torch.from_numpy(table.reshape(-1, table.shape[2])[order, held.start : held.stop])
            .to(torch.promote_types(first.dtype, torch.float32))
            .unsqueeze(2)
            for table in (self._plan.steps_since_reset(), self._plan.is_frozen())
        )
        is_free = 1 - is_frozen
        step_size, eps = step_size_and_eps(steps_since_reset, lr, self._adam)
        decay = 1 - lr * is_free * self.groups[0].weight_decay
        table = torch.stack([is_free, decay, step_size * is_free, eps], dim=1)
        return to_device(table, first.device)

    @torch.no_grad()
    def reset(self) -> None:
        """Zeroes the moments, or the first ones alone, of the vectors that the plan resets."""
        only_momentum = self._plan.config.reset_moments == "momentum"
        moments = (self._means,) if only_momentum else (self._means, self._squares)
        self._factors.zero_(self._plan.resets(), *(each.zeros() for each in moments))


class FactorMuon(Muon):
    """Muon on A and B of all layers, in blocks or not, as matrices [rank, in] and [rank, out].

    A frozen vector is zero in the matrix that is orthogonalized, so that the other rows of the
    update are what they would be without it.
    """

    def __init__(self, config: MuonKeys, factors: Factors, plan: Plan, compile_step: bool) -> None:
        super().__init__(config, factors.trained, compile_step)
        self._factors, self._plan = factors, plan

    @torch.no_grad()
    def step(self) -> None:
        """Updates every vector that is not frozen; a frozen one keeps its value, which weight decay
        would change, and its momentum, where AdamW's moments decay."""
        frozen = vector_spans(self._plan.is_frozen())
        low_bits = list(self.weights.low_bits.values())
        # Apart, since lists of one dtype are copied in a few kernels.
        tables: list[Sequence[Tensor | None]] = [self._factors.parameters, low_bits]
        tables += self.momenta.rows()
        kept = [self._factors.views(frozen, table) for table in tables if table]
        copies = [[torch.empty_like(view) for view in views] for views in kept]
        for views, values in zip(kept, copies, strict=True):
            copy_all_(list(zip(values, views, strict=True)))
        self._factors.zero_(frozen, self.momenta.zeros(), self._factors.gradients())
        super().step()
        for views, values in zip(kept, copies, strict=True):
            copy_all_(list(zip(views, values, strict=True)))

    @torch.no_grad()
    def reset(self) -> None:
        """Zeroes the momentum, the only state, of the vectors that the plan resets."""
        self._factors.zero_(self._plan.resets(), self.momenta.zeros())

"""The factors of all layers, and the rules that update their vectors: AdamW and Muon."""

from collections.abc import Iterator, Mapping
from operator import is_
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from switchtitan.distributed.blocks import compile_if
from switchtitan.distributed.copies import to_device
from switchtitan.distributed.shards import (
    ShardedRows,
    as_one_matrix,
    copy_all_,
    local_shards,
    row_range,
    with_local,
)
from switchtitan.methods.lowrank import LowRankLinear
from switchtitan.methods.lowrank.linear import FACTORS
from switchtitan.methods.switchlora.plan import Plan, VectorSpan, vector_spans
from switchtitan.optim import AdamWConfig
from switchtitan.optim.muon import Muon, MuonConfig
from switchtitan.optim.parameters import TrainedParameter

_ELEMENTS_PER_CALL = 2**25
"""The most elements that one call updates, if they belong to several factors: gradients are copied
next to each other, which takes 128 MiB for so many. A model's factors of one width are usually
fewer."""
_ELEMENTS_IN_CACHE = 2**16
"""Elements that a CPU updates at a time if nothing is compiled: all operations find them in its
cache, and temporary tensors reuse memory. For 10 million elements at a time, an update takes six
times as long."""


class FactorGroup(NamedTuple):
    """Factors of one width, updated in one call."""

    factors: list[int]
    vectors: slice
    """Among the local vectors of all groups."""


class Factors:
    """A and B of all layers, in groups of one width.

    Factors are indexed as the flattened first two dimensions of tables [2, layers, rank]: A of all
    layers, then B of all layers. A group is updated as one matrix. It takes few kernels if its
    local shards follow each other in memory, in the order of `layers`, A before B; otherwise they
    are copied.

    Args:
        layers: by qualified name, all of one rank.

    Attributes:
        names, parameters: of the factors.
        groups: of the factors that have local vectors.
        places: [vectors], the index of each local vector of all groups in a flattened table.
    """

    def __init__(self, layers: Mapping[str, LowRankLinear]) -> None:
        self.names = [f"{name}.{key}" for key in FACTORS for name in layers]
        self.parameters = [layer.get_parameter(key) for key in FACTORS for layer in layers.values()]
        self._num_layers = len(layers)
        rank, held = self.parameters[0].shape[0], row_range(self.parameters[0])
        self._num_held = len(held)
        self.groups = list(self._groups_of_one_width()) if held else []
        members = np.array([f for group in self.groups for f in group.factors], dtype=np.int64)
        self.places = np.add.outer(members * rank, np.arange(held.start, held.stop)).ravel()
        self._matrices: list[Tensor | None] = []
        self._shards_in_matrices: list[Tensor] = []

    def _groups_of_one_width(self) -> Iterator[FactorGroup]:
        """Groups of one width have one size, so that they share a compiled graph."""
        factors_of: dict[int, list[int]] = {}
        for layer in range(self._num_layers):
            for factor in (layer, self._num_layers + layer):
                factors_of.setdefault(self.parameters[factor].shape[1], []).append(factor)
        start = 0
        for width, factors in factors_of.items():
            limit = max(1, _ELEMENTS_PER_CALL // (self._num_held * width))
            size = _largest_divisor(len(factors), limit)
            for first in range(0, len(factors), size):
                stop = start + size * self._num_held
                yield FactorGroup(factors[first : first + size], slice(start, stop))
                start = stop

    def zeros(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns zeros [vectors, width] for each group, and for each factor its part of them, as a
        tensor that is sharded like the factor."""
        shards = local_shards(self.parameters)
        parts = [torch.zeros_like(shard) for shard in shards]
        of_groups = []
        for group in self.groups:
            like = shards[group.factors[0]]
            of_groups.append(like.new_zeros(len(group.factors) * self._num_held, like.shape[1]))
            rows = of_groups[-1].split(self._num_held)
            for factor, part in zip(group.factors, rows, strict=True):
                parts[factor] = part
        pairs = zip(self.parameters, parts, strict=True)
        return of_groups, [with_local(parameter.detach(), part) for parameter, part in pairs]

    def matrices(self) -> Iterator[Tensor]:
        """Yields the vectors of each group, [vectors, width], to be changed in place.

        A change is written when the next group is taken, if they had to be copied.
        """
        shards = local_shards(self.parameters)
        self._find_matrices(shards)
        for group, matrix in zip(self.groups, self._matrices, strict=True):
            parts = [shards[factor] for factor in group.factors]
            vectors = torch.cat(parts) if matrix is None else matrix
            yield vectors
            if matrix is None:
                copy_all_(list(zip(parts, vectors.split(self._num_held), strict=True)))

    def _find_matrices(self, shards: list[Tensor]) -> None:
        """Finds the matrix of each group, if its shards follow each other in memory.

        Again whenever a shard has been replaced, as FSDP may do before the first forward pass.
        """
        known = self._shards_in_matrices
        if len(known) != len(shards) or not all(map(is_, shards, known)):
            self._matrices = [
                as_one_matrix([shards[factor] for factor in group.factors]) for group in self.groups
            ]
            self._shards_in_matrices = shards

    def gradients(self) -> Iterator[Tensor]:
        """Yields the gradients of each group, [vectors, width]."""
        grads = local_shards([_gradient(parameter) for parameter in self.parameters])
        for group in self.groups:
            parts = [grads[factor] for factor in group.factors]
            yield torch.cat(parts) if len(parts) > 1 else parts[0]

    def views(self, tensors: list[Tensor], spans: list[VectorSpan]) -> list[Tensor]:
        """Returns this rank's rows of these vectors.

        Args:
            tensors: sharded like the factors, in their order.
        """
        rows: dict[int, ShardedRows] = {}
        views = []
        for factor, layer, vectors in spans:
            index = factor * self._num_layers + layer
            if index not in rows:
                rows[index] = ShardedRows(tensors[index])
            views += rows[index].views((vectors,))
        return views


class VectorAdamW:
    """AdamW on A and B of all layers, with bias corrections from each vector's own step count
    (SwitchLoRA, arXiv 2406.06564, sec. 3).

    Equals torch's AdamW as long as no vector is reset or frozen.

    Args:
        plan: says which vectors are frozen, and how often each was updated.
        compile_step: fuse the update of a matrix into one kernel.
    """

    def __init__(
        self, config: AdamWConfig, factors: Factors, plan: Plan, compile_step: bool
    ) -> None:
        self._config, self._factors, self._plan, self._lr = config, factors, plan, config.lr
        self._means, self._means_of_factors = factors.zeros()
        self._squares, self._squares_of_factors = factors.zeros()
        self._update = compile_if(compile_step)(update_vectors_)
        first = factors.parameters[0]
        # Fake tensors stand for those of a GPU.
        if not compile_step and first.device.type == "cpu" and not is_fake(first):
            self._update = update_in_blocks_

    @torch.no_grad()
    def step(self) -> None:
        """Updates every vector. A frozen one has a gradient of zero and does not change, not even
        by weight decay; its step count still increases."""
        coefficients = self._coefficients()
        for group, vectors, grad, mean, square in zip(
            self._factors.groups,
            self._factors.matrices(),
            self._factors.gradients(),
            self._means,
            self._squares,
            strict=True,
        ):
            of_group = coefficients[:, group.vectors, None]
            self._update(vectors, grad, mean, square, *of_group, betas=self._config.betas)

    def _coefficients(self) -> Tensor:
        """Returns the factors of the gradient and of the weight, the step size and the epsilon of
        each local vector, [4, vectors].

        Both bias corrections are in the step size, lr sqrt(1 - beta2^n) / (1 - beta1^n) after n
        steps, which saves a division for each element; epsilon is eps sqrt(1 - beta2^n).
        """
        (beta1, beta2), lr = self._config.betas, self._lr
        first, places = self._factors.parameters[0], self._factors.places
        num_updates = torch.from_numpy(self._plan.num_updates().ravel()[places]).to(first.dtype)
        is_free = torch.from_numpy(~self._plan.is_frozen().ravel()[places]).to(first.dtype)
        root = (1 - beta2**num_updates).sqrt()
        step_size = lr * root / (1 - beta1**num_updates) * is_free
        decay = 1 - lr * is_free * self._config.weight_decay
        table = torch.stack([is_free, decay, step_size, root * self._config.eps])
        return to_device(table, first.device)

    @torch.no_grad()
    def reset(self, spans: list[VectorSpan], only_momentum: bool) -> None:
        """Zeroes these vectors' first moments, and their second ones."""
        views = self._factors.views(self._means_of_factors, spans)
        if not only_momentum:
            views += self._factors.views(self._squares_of_factors, spans)
        if views:
            torch._foreach_zero_(views)

    def set_lr(self, lr_factor: float) -> None:
        self._lr = self._config.lr * lr_factor

    def zero_grad(self) -> None:
        for parameter in self._factors.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Returns `<layer>.lora_a.exp_avg` and so on, sharded like the factors."""
        moments = {"exp_avg": self._means_of_factors, "exp_avg_sq": self._squares_of_factors}
        return {
            f"{name}.{key}": of_factor
            for key, of_factors in moments.items()
            for name, of_factor in zip(self._factors.names, of_factors, strict=True)
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for key, tensor in self.state_dict().items():
            tensor.copy_(state[key])


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
    """Updates vectors by AdamW (arXiv 1711.05101, Algorithm 2).

    Args:
        vectors, exp_avg, exp_avg_sq: [vectors, width]; changed in place.
        mask, decay, step_size, eps: [vectors, 1] each, see `VectorAdamW`.
    """
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

    The row of a frozen vector is zero in the matrix that is orthogonalized. It then is zero in the
    update, and the other rows are what they would be without it. Rows of an update are all of about
    one size, whatever the size of their momentum: a vector whose momentum was reset moves as far as
    the others in the first step in which it is not frozen.

    Args:
        plan: says which vectors are frozen.
        compute_dtype: of products and of the rows that ranks exchange.
    """

    def __init__(
        self,
        config: MuonConfig,
        factors: Factors,
        plan: Plan,
        compute_dtype: torch.dtype,
        compile_step: bool,
    ) -> None:
        named = zip(factors.names, factors.parameters, strict=True)
        trained = [TrainedParameter(*pair, compute_dtype=compute_dtype) for pair in named]
        super().__init__(config, trained, compile_step)
        self._factors, self._plan = factors, plan
        self._momenta_of_factors = list(self.state_dict().values())

    @torch.no_grad()
    def step(self) -> None:
        """Updates every vector that is not frozen; a frozen one keeps its value and momentum."""
        frozen = vector_spans(self._plan.is_frozen())
        parameters = [parameter.detach() for parameter in self._factors.parameters]
        momenta = self._factors.views(self._momenta_of_factors, frozen)
        kept = self._factors.views(parameters, frozen) + momenta
        copies = [torch.empty_like(view) for view in kept]
        copy_all_(list(zip(copies, kept, strict=True)))
        if momenta:
            grads = [_gradient(parameter) for parameter in self._factors.parameters]
            torch._foreach_zero_(momenta + self._factors.views(grads, frozen))
        super().step()
        copy_all_(list(zip(kept, copies, strict=True)))

    @torch.no_grad()
    def reset(self, spans: list[VectorSpan], only_momentum: bool) -> None:
        """Zeroes these vectors' momentum, which is their only state."""
        if views := self._factors.views(self._momenta_of_factors, spans):
            torch._foreach_zero_(views)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "a factor has no gradient"
    return parameter.grad


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, min(number, limit) + 1) if number % divisor == 0)

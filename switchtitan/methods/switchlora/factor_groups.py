"""The factors of all layers, in groups of one width that are updated as one matrix."""

from collections.abc import Iterator
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor, nn

from switchtitan.distributed.adjacent import as_one_matrix, with_local
from switchtitan.distributed.shards import ShardedRows, copy_all_, local_shards, row_range
from switchtitan.methods.lowrank import LowRankLinear
from switchtitan.methods.switchlora.schedule import FACTORS, VectorSpan

_ELEMENTS_PER_CALL = 2**25
"""The most elements that one call updates, if they belong to several factors: gradients are copied
next to each other, which takes 128 MiB for so many. A model's factors of one width are usually
fewer."""


class FactorGroup(NamedTuple):
    """Factors of one width, updated in one call.

    Their local vectors follow each other, in the order of `factors`.
    """

    factors: list[int]
    vectors: slice
    """Among the local vectors of all groups."""
    shape: tuple[int, int]
    """[vectors, width]."""


class FactorGroups:
    """A and B of all layers, in groups of one width.

    Factors are indexed as the flattened first two dimensions of tables [2, layers, rank]: A of all
    layers, then B of all layers.

    Factors of one group are updated as one matrix. It takes few kernels if their local shards
    follow each other in memory, in the order of `layers`, A before B; otherwise they are copied.

    Args:
        layers: by qualified name, all of one rank.

    Attributes:
        factors: the parameters.
        table_shape: 2, layers, rank.
        groups: of the factors that have local vectors.
        places: [vectors] int64, the index of each local vector of all groups in a flattened table.
    """

    def __init__(self, layers: dict[str, LowRankLinear]) -> None:
        keys = ("lora_a", "lora_b")
        self._names = [f"{name}.{key}" for key in keys for name in layers]
        self.factors = [layer.get_parameter(key) for key in keys for layer in layers.values()]
        first = self.factors[0]
        self._dtype, self._device = first.dtype, first.device
        self.table_shape = len(FACTORS), len(layers), first.shape[0]
        self.groups = self._groups_of_one_width()
        self.places = self._places_of_vectors()
        self._matrices: list[Tensor | None] = []
        self._shards_in_matrices: list[Tensor] = []

    def _groups_of_one_width(self) -> list[FactorGroup]:
        """Returns groups of all factors with local rows; those of one width are of one size, so
        that they share a graph."""
        factors_of: dict[int, list[int]] = {}
        num_layers = self.table_shape[1]
        num_rows = len(row_range(self.factors[0]))
        for layer in range(num_layers if num_rows else 0):
            for factor in (layer, num_layers + layer):
                factors_of.setdefault(self.factors[factor].shape[1], []).append(factor)
        groups = []
        start = 0
        for width, factors in factors_of.items():
            limit = max(1, _ELEMENTS_PER_CALL // (num_rows * width))
            size = _largest_divisor(len(factors), limit)
            num_vectors = size * num_rows
            for first in range(0, len(factors), size):
                vectors = slice(start, start + num_vectors)
                members = factors[first : first + size]
                groups.append(FactorGroup(members, vectors, (num_vectors, width)))
                start += num_vectors
        return groups

    def _places_of_vectors(self) -> Tensor:
        rank = self.table_shape[2]
        held = row_range(self.factors[0])
        factors = [factor for group in self.groups for factor in group.factors]
        places = [factor * rank + vector for factor in factors for vector in held]
        return torch.tensor(places, dtype=torch.int64, device=self._device)

    def new_moments(self) -> list[Tensor]:
        """Returns zeros [vectors, width] for each group."""
        return [
            torch.zeros(group.shape, dtype=self._dtype, device=self._device)
            for group in self.groups
        ]

    def split(self, of_groups: list[Tensor]) -> list[Tensor]:
        """Returns this rank's rows of each factor, [held, width], which share memory with these.

        Args:
            of_groups: [vectors, width] for each group.
        """
        parts = [torch.empty_like(shard) for shard in local_shards(self.factors)]
        for group, matrix in zip(self.groups, of_groups, strict=True):
            for factor, part in zip(
                group.factors, matrix.split(len(matrix) // len(group.factors)), strict=True
            ):
                parts[factor] = part
        return parts

    def rows_of(self, of_groups: list[Tensor]) -> list[ShardedRows]:
        """Returns each factor's rows, sharded like the factor; they share memory with these.

        Args:
            of_groups: [vectors, width] for each group, of the factors' dtype.
        """
        return [
            ShardedRows(with_local(factor.detach(), part))
            for factor, part in zip(self.factors, self.split(of_groups), strict=True)
        ]

    def by_name(self) -> dict[str, nn.Parameter]:
        """Returns the factors by qualified name."""
        return dict(zip(self._names, self.factors, strict=True))

    def state(self, key: str, rows: list[ShardedRows]) -> dict[str, Tensor]:
        """Returns `<layer>.lora_a.<key>` and so on, sharded like the factors."""
        return {
            f"{name}.{key}": of_factor.matrix
            for name, of_factor in zip(self._names, rows, strict=True)
        }

    def views(self, rows: list[ShardedRows], spans: list[VectorSpan]) -> list[Tensor]:
        """Returns this rank's rows of these vectors."""
        return [view for span in spans for view in rows[self.index_of(span)].views((span.vectors,))]

    def index_of(self, span: VectorSpan) -> int:
        """Returns the index of a span's factor."""
        return span.factor * self.table_shape[1] + span.layer

    def gradients(self) -> list[Tensor]:
        """Returns this rank's rows of each factor's gradient."""
        grads = []
        for name, factor in zip(self._names, self.factors, strict=True):
            assert factor.grad is not None, f"no gradient for {name}"
            grads.append(factor.grad)
        return local_shards(grads)

    @torch.no_grad()
    def ratios_to_gradients(self, of_groups: list[Tensor]) -> Tensor:
        """Returns the norms of vectors over those of their gradients, [2, layers, rank].

        Zero for a gradient of zero, and for vectors of other ranks.

        Args:
            of_groups: [vectors, width] for each group.
        """
        table = torch.zeros(self.table_shape, dtype=self._dtype, device=self._device)
        grads = self.gradients()
        for group, matrix in zip(self.groups, of_groups, strict=True):
            norms = torch.linalg.vector_norm(stacked(grads, group), dim=1)
            ratios = torch.linalg.vector_norm(matrix, dim=1) / norms
            places = self.places[group.vectors]
            table.view(-1).index_copy_(0, places, torch.where(norms > 0, ratios, 0))
        return table

    def zero_grad(self) -> None:
        for parameter in self.factors:
            parameter.grad = None

    def matrices(self) -> Iterator[tuple[FactorGroup, Tensor]]:
        """Yields each group and its vectors, [vectors, width], to be changed in place.

        A change is written when the next group is taken, if the factors are not next to each other.
        """
        shards = local_shards(self.factors)
        self._find_matrices(shards)
        for group, matrix in zip(self.groups, self._matrices, strict=True):
            vectors = matrix if matrix is not None else stacked(shards, group)
            yield group, vectors
            if matrix is None and len(group.factors) > 1:
                targets = [shards[factor] for factor in group.factors]
                copy_all_(list(zip(targets, _split_like(vectors, targets), strict=True)))

    def _find_matrices(self, shards: list[Tensor]) -> None:
        """Finds the matrix of each group, if its shards follow each other in memory.

        Again whenever a shard has been replaced, as FSDP may do before the first forward pass.
        """
        if len(self._shards_in_matrices) == len(shards) and all(
            map(is_, shards, self._shards_in_matrices)
        ):
            return
        self._matrices = [
            as_one_matrix([shards[factor] for factor in group.factors]) for group in self.groups
        ]
        self._shards_in_matrices = shards


def stacked(shards: list[Tensor], group: FactorGroup) -> Tensor:
    """Returns a group's rows [vectors, width] of all factors' shards: a copy if they are several.

    Args:
        shards: [held, width] of each factor.
    """
    first = shards[group.factors[0]]
    if len(group.factors) == 1:
        return first
    parts = [shards[factor] for factor in group.factors]
    matrix = first.new_empty(group.shape)
    copy_all_(list(zip(_split_like(matrix, parts), parts, strict=True)))
    return matrix


def zero_all_(tensors: list[Tensor]) -> None:
    """Zeroes tensors, if there are any."""
    if tensors:
        torch._foreach_zero_(tensors)


def _split_like(matrix: Tensor, parts: list[Tensor]) -> tuple[Tensor, ...]:
    return matrix.split(len(parts[0]))


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, min(number, limit) + 1) if number % divisor == 0)

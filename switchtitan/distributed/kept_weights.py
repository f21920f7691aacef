"""Frozen weights that are sharded between steps, and gathered once for all passes of a step."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from switchtitan.contracts import LanguageModel
from switchtitan.distributed.shards import copy_all_, rows_per_rank, shard_buffer


def keep_frozen_weights(
    model: LanguageModel, units: list[list[nn.Module]], mesh: DeviceMesh, dtype: torch.dtype
) -> None:
    """Shards the model's frozen weights, and gathers them in the first forward pass of a step.

    Until `model.free_kept_weights` is called, modules hold full plain tensors in `dtype` instead of
    their shards. A unit is gathered, in one collective, while the unit before it computes. Weights
    outside the units are one more, which is gathered when the model is called. Call on the meta
    device; `fully_shard` must ignore the new parameters.

    Args:
        units: modules in the order of their first calls.
    """
    group = mesh.get_group(mesh.ndim - 1)
    owners = [[owner for module in unit for owner in module.modules()] for unit in units]
    in_units = {owner for unit in owners for owner in unit}
    rest = [owner for owner in model.modules() if owner not in in_units]
    kept = []
    for first_module, unit in [(model, rest), *((unit[0], unit) for unit in owners)]:
        weights = [
            _Weight(owner, name)
            for owner in unit
            for name, parameter in owner.named_parameters(recurse=False)
            if not parameter.requires_grad
        ]
        if weights:
            for owner, name in weights:
                shard = shard_buffer(owner.get_parameter(name), mesh)
                setattr(owner, name, nn.Parameter(shard, requires_grad=False))
            kept.append((first_module, _KeptUnit(weights, group, dtype)))
    if kept:
        model.free_kept_weights = _KeptWeights(model, kept).free


class _Weight(NamedTuple):
    """A parameter of a module."""

    owner: nn.Module
    name: str


class _KeptWeights:
    """Gathers units before the first pass of a step uses them."""

    def __init__(self, model: nn.Module, kept: "list[tuple[nn.Module, _KeptUnit]]") -> None:
        self._units = [unit for _, unit in kept]
        model.register_forward_pre_hook(lambda *_: self._units[0].start())
        for index, (first_module, _) in enumerate(kept):
            first_module.register_forward_pre_hook(self._gather_before(index))

    def free(self) -> None:
        """Puts the shards back, and frees the full tensors."""
        for unit in self._units:
            unit.free()

    def _gather_before(self, index: int) -> Callable[[nn.Module, tuple], None]:
        unit, next_units = self._units[index], self._units[index + 1 : index + 2]

        # torch.compile must not trace it with the module's forward method.
        @torch.compiler.disable
        def gather(module: nn.Module, args: tuple) -> None:
            unit.start()
            for next_unit in next_units:
                next_unit.start()
            unit.finish()

        return gather


class _KeptUnit:
    """Weights that one collective gathers.

    Args:
        group: the ranks that share the weights.
        dtype: of the full tensors.
    """

    def __init__(
        self, weights: list[_Weight], group: dist.ProcessGroup, dtype: torch.dtype
    ) -> None:
        self._weights = weights
        self._group, self._num_ranks, self._dtype = group, group.size(), dtype
        self._shapes = [owner.get_parameter(name).shape for owner, name in weights]
        self._sizes = [
            rows_per_rank(shape[0], self._num_ranks) * shape[1:].numel() for shape in self._shapes
        ]
        """Number of values of each padded shard."""
        self._shards: list[nn.Parameter] = []
        self._gathering: tuple[Tensor, dist.Work | None] | None = None
        # Allocated once; freed and allocated again by resizing their storage, as FSDP does, so that
        # compiled code meets the same tensors in every step.
        self._padded: list[Tensor] = []
        self._full: list[nn.Parameter] = []

    @torch.no_grad()
    def start(self) -> None:
        """Starts gathering, unless that was done in this step."""
        if self._gathering is not None or self._shards:
            return
        # `get_parameter` and `to_local` take ten times as long.
        shards = [owner._parameters[name]._local_tensor for owner, name in self._weights]  # type: ignore[union-attr]
        rank, num_values = self._group.rank(), sum(self._sizes)
        gathered = shards[0].new_empty(self._num_ranks * num_values, dtype=self._dtype)
        own = gathered.narrow(0, rank * num_values, num_values)
        pairs = [
            (piece.narrow(0, 0, shard.numel()).view(shard.shape), shard)
            for piece, shard in zip(own.split(self._sizes), shards, strict=True)
            # The last ranks may hold no rows.
            if shard.numel()
        ]
        copy_all_(pairs)
        work = None
        if self._num_ranks > 1:
            work = dist.all_gather_single(gathered, own, group=self._group, async_op=True)
        self._gathering = gathered, work

    @torch.no_grad()
    def finish(self) -> None:
        """Puts full tensors in place of the shards, if gathering has started."""
        if self._gathering is None:
            return
        gathered, work = self._gathering
        self._gathering = None
        self._allocate(gathered)
        if work is not None:
            work.wait()
        torch.split_with_sizes_copy(
            gathered.view(self._num_ranks, -1),
            self._sizes,
            dim=1,
            out=[padded.view(self._num_ranks, -1) for padded in self._padded],
        )
        self._shards = [owner._parameters[name] for owner, name in self._weights]  # type: ignore[misc]
        self._put(self._full)

    def free(self) -> None:
        """Puts the shards back, and frees the full tensors."""
        if self._gathering is not None:
            _, work = self._gathering
            if work is not None:
                work.wait()
            self._gathering = None
        if self._shards:
            self._put(self._shards)
            self._shards = []
            for padded in self._padded:
                padded.untyped_storage().resize_(0)

    def _allocate(self, like: Tensor) -> None:
        if self._padded:
            for padded in self._padded:
                padded.untyped_storage().resize_(padded.numel() * padded.element_size())
            return
        for shape, size in zip(self._shapes, self._sizes, strict=True):
            padded = like.new_empty(self._num_ranks * size)
            self._padded.append(padded)
            full = padded[: shape.numel()].view(shape)
            self._full.append(nn.Parameter(full, requires_grad=False))

    def _put(self, parameters: list[nn.Parameter]) -> None:
        for (owner, name), parameter in zip(self._weights, parameters, strict=True):
            # `setattr` takes ten times as long.
            owner._parameters[name] = parameter

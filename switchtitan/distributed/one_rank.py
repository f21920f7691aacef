"""FSDP2 where one rank holds all rows: a unit's parameters are cast in one kernel.

FSDP2 itself casts, then copies, each parameter, and copies the packed gradients once more.
Import it with torch 2.13 only, whose private names it uses.
(torch/distributed/fsdp/_fully_shard: _fsdp_param_group.py, _fsdp_collectives.py)
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from switchtitan.distributed.rows import copy_all_


def use_few_kernels(model: nn.Module) -> None:
    """Saves kernels of a model that is sharded over one rank, without effect on any value."""
    for unit in [module for module in model.modules() if isinstance(module, FSDPModule)]:
        unit.set_custom_reduce_scatter(_ReduceInPlace())
        for group in unit._get_fsdp_state()._fsdp_param_groups:
            group.wait_for_unshard = partial(_cast_parameters, group)  # type: ignore[method-assign]


@torch.no_grad()
def _cast_parameters(group: FSDPParamGroup) -> None:
    """Does what `FSDPParamGroup.wait_for_unshard` does on one rank."""
    if group._all_gather_result is None:
        return
    full: list[Tensor] = []
    by_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for parameter in group.fsdp_params:
        shard = parameter._sharded_param_data
        dtype = parameter.param_dtype or shard.dtype
        parameter.init_all_gather_outputs([shard.numel()], [dtype], 1, group.device)
        parameter.alloc_all_gather_outputs()
        full += parameter.all_gather_outputs
        by_dtype.setdefault(shard.dtype, []).append((full[-1], shard))
    with torch.autograd._unsafe_preserve_version_counter(tuple(full)):
        for pairs in by_dtype.values():
            copy_all_(pairs)
    for parameter in group.fsdp_params:
        parameter.init_unsharded_param()
    group._to_unsharded()
    group._all_gather_result = None


class _ReduceInPlace(DefaultReduceScatter):
    """Gives the reduced gradients the memory of the packed ones, which FSDP2 allocates before."""

    def __init__(self) -> None:
        self._packed: Tensor | None = None

    def allocate(self, *args: Any, **keys: Any) -> Tensor:
        packed, self._packed = self._packed, None
        if packed is None:
            packed = self._packed = super().allocate(*args, **keys)
        return packed

"""FSDP2 where one rank holds all rows: full parameters and gradients in one kernel for each unit.

FSDP2 itself casts, then copies, each parameter, and copies the packed gradients once more.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from switchtitan.distributed.rows import copy_all_

_IS_KNOWN_TORCH = torch.__version__.startswith("2.13.")
"""Whether `_cast_parameters` does what this torch does, with its private names."""


def use_few_kernels(model: nn.Module) -> None:
    """Replaces kernels for each parameter of a sharded model whose shards have one rank."""
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        module.set_custom_reduce_scatter(_ReduceInPlace())
        if _IS_KNOWN_TORCH:
            for group in module._get_fsdp_state()._fsdp_param_groups:
                group.wait_for_unshard = partial(_cast_parameters, group)  # type: ignore[method-assign]


@torch.no_grad()
def _cast_parameters(group: FSDPParamGroup) -> None:
    """Takes the place of `FSDPParamGroup.wait_for_unshard`."""
    if group._all_gather_result is None:
        return
    full: list[Tensor] = []
    of_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for parameter in group.fsdp_params:
        shard = parameter._sharded_param_data
        dtype = parameter.param_dtype or shard.dtype
        parameter.init_all_gather_outputs([shard.numel()], [dtype], 1, group.device)
        parameter.alloc_all_gather_outputs()
        full += parameter.all_gather_outputs
        of_dtype.setdefault(shard.dtype, []).append((full[-1], shard))
    with torch.autograd._unsafe_preserve_version_counter(tuple(full)):
        for pairs in of_dtype.values():
            copy_all_(pairs)
    for parameter in group.fsdp_params:
        parameter.init_unsharded_param()
    group._to_unsharded()
    group._all_gather_result = None


class _ReduceInPlace(ReduceScatter):
    """Gives the reduced gradients the memory of the packed ones, which FSDP2 asks for before."""

    def __init__(self) -> None:
        self._packed: Tensor | None = None

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        if self._packed is not None:
            reduced, self._packed = self._packed, None
            return reduced
        self._packed = torch.empty(*size, dtype=dtype, device=device)
        return self._packed

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        raise AssertionError("one rank has nothing to reduce")

"""Matrices of one width next to each other in memory, so that one kernel updates all of them."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from switchtitan.distributed.shards import local


def allocate_adjacent(matrices: Iterable[Tensor], device: torch.device) -> dict[Tensor, Tensor]:
    """Allocates an empty tensor like each of `matrices` on `device`.

    The local shards of matrices of one width and dtype follow each other, in the given order, and
    share memory.

    Args:
        matrices: [rows, width], DTensors or plain tensors, perhaps on the meta device.
    """
    alike: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    for matrix in matrices:
        alike.setdefault((matrix.shape[1], matrix.dtype), []).append(matrix)
    allocated = {}
    for (width, dtype), tensors in alike.items():
        num_rows = [local(tensor).shape[0] for tensor in tensors]
        memory = torch.empty(sum(num_rows), width, dtype=dtype, device=device)
        for tensor, part in zip(tensors, memory.split(num_rows), strict=True):
            allocated[tensor] = with_local(tensor, part)
    return allocated


def empty_on(tensor: Tensor, device: torch.device, allocated: Mapping[Tensor, Tensor]) -> Tensor:
    """Returns the tensor allocated for `tensor`, if any, or else an empty one like it."""
    return allocated[tensor] if tensor in allocated else torch.empty_like(tensor, device=device)


def with_local(tensor: Tensor, part: Tensor) -> Tensor:
    """Returns a tensor of the shape and placement of `tensor`, with local shard `part`."""
    if not isinstance(tensor, DTensor):
        return part
    # As FSDP2 does it: `from_local` would move the shard to the mesh's device.
    return DTensor(part, tensor._spec, requires_grad=False)


def as_one_matrix(parts: list[Tensor]) -> Tensor | None:
    """Returns [all rows, width], a view of matrices that follow each other in memory.

    None if they do not. Not for autograd.
    """
    first = parts[0]
    storage, offset = first.untyped_storage()._cdata, first.storage_offset()
    for part in parts:
        if (
            part.untyped_storage()._cdata != storage
            or part.storage_offset() != offset
            or not part.is_contiguous()
        ):
            return None
        offset += part.numel()
    width = first.shape[1]
    num_rows = sum(part.shape[0] for part in parts)
    return first.detach().as_strided((num_rows, width), (width, 1))

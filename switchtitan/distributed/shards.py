"""Operations on the local shards of DTensors; a plain tensor is its own shard.

DTensors here are sharded along dimension 0 over the last dimension of their mesh, as FSDP2 and HSDP
shard parameters.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard


def local(tensor: Tensor) -> Tensor:
    """Returns the local shard, sharing memory with `tensor`; not for autograd."""
    # `to_local` takes ten times as long.
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def local_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns `local` of each tensor."""
    return list(map(local, tensors))


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns the full tensor on every rank; collective over its mesh."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.dtype == torch.int16:  # which neither gloo nor NCCL sends
        as_bytes = _sharded(local(tensor).view(torch.uint8), len(tensor), tensor.device_mesh)
        return as_bytes.full_tensor().view(torch.int16)
    return tensor.full_tensor()


def gather_on_main(tensors: Iterable[tuple[str, Tensor]], is_main: bool) -> dict[str, Tensor]:
    """Returns full tensors by name on the main rank's CPU, one gathered at a time; collective.

    An empty dict on the other ranks.
    """
    gathered = {}
    for name, tensor in tensors:
        full = full_tensor(tensor.detach())
        if is_main:
            gathered[name] = full.cpu()
    return gathered


def row_range(tensor: Tensor) -> range:
    """Returns the rows (dimension 0) that this rank holds."""
    if not isinstance(tensor, DTensor):
        return range(tensor.shape[0])
    return _held_rows(tensor.shape[0], tensor.device_mesh)


def rows_per_rank(num_rows: int, num_ranks: int) -> int:
    """Returns the rows on each of the first ranks; the last hold fewer or none, as in DTensor."""
    return -(-num_rows // num_ranks)


def shard_group(tensor: Tensor) -> dist.ProcessGroup | None:
    """Returns the group of ranks that hold the other shards; None if this rank holds all rows."""
    if not isinstance(tensor, DTensor):
        return None
    mesh = tensor.device_mesh
    group = mesh.get_group(mesh.ndim - 1)
    return group if group.size() > 1 else None


def replica_group(tensor: Tensor) -> dist.ProcessGroup | None:
    """Returns the group of ranks that hold the same shard; None if this rank alone holds it."""
    if not isinstance(tensor, DTensor) or tensor.device_mesh.ndim == 1:
        return None
    group = tensor.device_mesh.get_group(0)
    return group if group.size() > 1 else None


def all_ranks_group(tensor: Tensor) -> dist.ProcessGroup | None:
    """Returns the group of ranks that hold shards of `tensor`, of all replicas; None for one rank.

    Several replicas are all ranks of the run.
    """
    if not isinstance(tensor, DTensor) or tensor.device_mesh.size() == 1:
        return None
    return shard_group(tensor) if tensor.device_mesh.ndim == 1 else dist.group.WORLD


def copy_from_full_(target: Tensor, value: Tensor) -> None:
    """Writes this rank's rows of the full tensor `value` into `target`."""
    rows = row_range(target)
    with torch.no_grad():
        local(target).copy_(value[rows.start : rows.stop] if isinstance(target, DTensor) else value)


def as_shard_of(part: Tensor, full: Tensor) -> Tensor:
    """Returns `part` [held rows, ...] as the local shard of a tensor with rows and placement of
    `full`; shares memory with `part`. `part` itself if `full` is a plain tensor."""
    return _sharded(part, full.shape[0], full.device_mesh) if isinstance(full, DTensor) else part


def shard_buffer(buffer: Tensor, mesh: DeviceMesh) -> DTensor:
    """Returns an empty DTensor like the meta tensor `buffer`, sharded as FSDP2 does it."""
    num_held = len(_held_rows(len(buffer), mesh))
    return _sharded(buffer.new_empty(num_held, *buffer.shape[1:]), len(buffer), mesh)


def _sharded(part: Tensor, num_rows: int, mesh: DeviceMesh) -> DTensor:
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    layout = torch.empty(num_rows, *part.shape[1:], device="meta")
    shape, stride = layout.shape, layout.stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def with_local(tensor: Tensor, part: Tensor) -> Tensor:
    """Returns a tensor of the shape and placement of `tensor`, with local shard `part`."""
    if not isinstance(tensor, DTensor):
        return part
    # As FSDP2 does it: `from_local` would move the shard to the mesh's device.
    return DTensor(part, tensor._spec, requires_grad=False)


def _held_rows(num_rows: int, mesh: DeviceMesh) -> range:
    """The rows that this rank holds of `num_rows`; torch's function for it creates tensors."""
    dim = mesh.ndim - 1
    chunk = rows_per_rank(num_rows, mesh.size(dim))
    start = min(mesh.get_local_rank(dim) * chunk, num_rows)
    stop = min(start + chunk, num_rows)
    return range(start, stop) if start < stop else range(0)

"""Work on the shards of DTensors; the identity on plain tensors.

Tensors here are plain, or split along dimension 0 over the last dimension of their mesh, as FSDP2 and HSDP split parameters.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory with `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The unsharded tensor, on every rank; all ranks of its mesh must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_on_main(tensors: Iterable[tuple[str, Tensor]], is_main: bool) -> dict[str, Tensor]:
    """Unsharded tensors by name, on the CPU of the main rank; the other ranks get an empty dict.

    One tensor is gathered at a time. All ranks of their mesh must call.
    """
    gathered = {}
    for name, tensor in tensors:
        full = full_tensor(tensor.detach())
        if is_main:
            gathered[name] = full.cpu()
    return gathered


def row_range(tensor: Tensor) -> range:
    """The rows (dimension 0) that this rank holds."""
    if not isinstance(tensor, DTensor):
        return range(tensor.shape[0])
    return _held_rows(tensor.shape[0], tensor.device_mesh)


def rows_per_rank(num_rows: int, num_ranks: int) -> int:
    """Rows on each of the first ranks; the last ones hold what is left, perhaps nothing, as torch.chunk and DTensor cut."""
    return -(-num_rows // num_ranks)


def shard_group(tensor: Tensor) -> dist.ProcessGroup | None:
    """The ranks that hold the other parts; None where this rank holds all."""
    if not isinstance(tensor, DTensor):
        return None
    mesh = tensor.device_mesh
    group = mesh.get_group(mesh.ndim - 1)
    return group if group.size() > 1 else None


def copy_from_full_(target: Tensor, value: Tensor) -> None:
    """Writes this rank's rows of the whole `value` into `target`."""
    rows = row_range(target)
    with torch.no_grad():
        local(target).copy_(value[rows.start : rows.stop] if isinstance(target, DTensor) else value)


def shard_buffer(buffer: Tensor, mesh: DeviceMesh) -> DTensor:
    """An empty DTensor of the buffer's shape on the meta device, split along dimension 0 as FSDP2 splits parameters."""
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    shape = len(_held_rows(buffer.shape[0], mesh)), *buffer.shape[1:]
    part = torch.empty(shape, dtype=buffer.dtype, device=buffer.device)
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=buffer.shape, stride=buffer.stride()
    )


def empty_on_host_like(tensor: Tensor) -> Tensor:
    """Pageable memory of the host for a tensor of this shape, dtype and placement, whatever the mesh's devices are."""
    part = local(tensor)
    on_host = torch.empty(part.shape, dtype=part.dtype, device="cpu")
    if not isinstance(tensor, DTensor):
        return on_host
    # As FSDP2 makes parameters that it off-loads: `from_local` would move the part to the mesh's device.
    return DTensor(on_host, tensor._spec, requires_grad=False)


Spans = tuple[range, ...]
"""Rows as spans of neighbours, in order: what a ring hands out, and cheap to slice."""


class ShardedRows:
    """A matrix [rows, width], split along dimension 0 or plain, as the rows of it that this rank holds.

    Which rows those are is looked up once, since a mesh takes longer to answer than a slice takes. For use without autograd.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.width, self.dtype = matrix.shape[1], matrix.dtype
        self.held = row_range(matrix)
        self._is_sharded = isinstance(matrix, DTensor)

    @property
    def shard(self) -> Tensor:
        """The local shard [held, width]."""
        # Not kept: FSDP exchanges a parameter's shard before the first forward pass if it must be padded. Not `to_local`, which
        # takes ten times as long.
        return self.matrix._local_tensor if self._is_sharded else self.matrix  # type: ignore[attr-defined]

    def views(self, spans: Spans) -> list[Tensor]:
        """The rows of `spans` that this rank holds, a view for each span that has any."""
        return [self.shard.narrow(0, first, count) for _, first, count in self._segments(spans)]

    def paired(self, spans: Spans, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What this rank holds of `spans`, as views of it and of the same rows of `rows` [wanted, width]."""
        return [
            (self.shard.narrow(0, first, count), rows.narrow(0, position, count))
            for position, first, count in self._segments(spans)
        ]

    def _segments(self, spans: Spans) -> list[tuple[int, int, int]]:
        """(position among all rows of `spans`, place in the local shard, number of rows)."""
        first, end = self.held.start, self.held.stop
        segments = []
        position = 0
        for span in spans:
            start, stop = span.start, span.stop
            # Most spans lie on other ranks.
            if start < end and first < stop:
                held_start, held_stop = max(start, first), min(stop, end)
                if held_start < held_stop:
                    segments.append(
                        (position + held_start - start, held_start - first, held_stop - held_start)
                    )
            position += stop - start
        return segments


def write_rows_(targets: list[ShardedRows], spans: list[Spans], rows: list[Tensor]) -> None:
    """Writes `rows[i]` [wanted, width] to the rows `spans[i]` of `targets[i]` that this rank holds, in few operations.

    Args:
        targets: of one dtype, as are `rows`.
    """
    copy_all_(
        [
            pair
            for target, wanted, values in zip(targets, spans, rows, strict=True)
            for pair in target.paired(wanted, values)
        ]
    )


def copy_all_(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copies each pair's second tensor into its first, in few operations.

    On CUDA that takes a few kernels for contiguous tensors if all first ones are of one dtype and all second ones of one; else
    one kernel for every pair. (torch/aten, ForeachUtils.h)
    """
    if pairs:
        torch._foreach_copy_([into for into, _ in pairs], [values for _, values in pairs])


def _held_rows(num_rows: int, mesh: DeviceMesh) -> range:
    """The rows of a tensor of `num_rows` that this rank holds.

    In integers; torch's function for any placement makes tensors on the way, for every call.
    """
    dim = mesh.ndim - 1
    chunk = rows_per_rank(num_rows, mesh.size(dim))
    start = min(mesh.get_local_rank(dim) * chunk, num_rows)
    stop = min(start + chunk, num_rows)
    return range(start, stop) if start < stop else range(0)

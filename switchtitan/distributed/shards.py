"""Work on the shards of DTensors; the identity on plain tensors.

Tensors here are plain, or split along dimension 0 over the last dimension of their mesh, as FSDP2 and HSDP split parameters.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from switchtitan.errors import RanksDisagreeError


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


def rows_aligned_with(tensor: Tensor, other: Tensor) -> Tensor:
    """The rows of `tensor` that this rank holds of `other`, which has as many: its part, or all of them, gathered, where it
    holds `other` whole. All ranks of the mesh must call.
    """
    return local(tensor) if isinstance(other, DTensor) else full_tensor(tensor)


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
"""Rows, or columns, as spans of neighbours, in order: what a ring buffer hands out, and cheap to slice."""


@dataclass(frozen=True)
class RowRequest:
    """Rows of one tensor that every rank wants whole."""

    tensor: Tensor
    """[rows, width], split along dimension 0; or plain, which counts as the sum of all ranks' bit patterns, so that a rank may
    fill in what it has, and zeros for the rest."""
    spans: Spans
    """Which rows, the same on every rank."""

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.spans))


class RowExchange:
    """Gathers rows of many sharded tensors on all ranks that share them, in one collective.

    Every rank fills in the rows it owns and zeros for the rest; a sum over the bit patterns brings all rows to all ranks
    exactly. With them travels a checksum of what each rank asked for: where two ranks disagree, `check` raises. The flag stays
    on the device until then, so that gathering waits for nothing.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group = group
        self._disagreement = torch.zeros((), dtype=torch.bool, device=device)

    def gather(self, requests: list[RowRequest], checksum: int) -> list[Tensor]:
        """Copies of the rows of each request, [wanted, width].

        Args:
            checksum: any 31-bit number that ranks which agree have in common.
        """
        num_ranks = 1 if self._group is None else self._group.size()
        header = num_ranks + num_ranks % 2
        sizes = [_num_words(request) for request in requests]
        num_words = header + sum(sizes)
        if self._group is not None:
            num_words = padded_length(num_words)
        packed = torch.zeros(num_words, dtype=torch.int32, device=self._disagreement.device)
        rows = [
            words.view(request.tensor.dtype)[: request.num_rows * request.tensor.shape[1]].view(
                request.num_rows, request.tensor.shape[1]
            )
            for words, request in zip(
                packed[header : header + sum(sizes)].split(sizes), requests, strict=True
            )
        ]
        segments = [
            (destination[into], local(request.tensor)[held])
            for destination, request in zip(rows, requests, strict=True)
            for into, held in owned_segments(request.tensor, request.spans)
        ]
        copy_all_([destination for destination, _ in segments], [source for _, source in segments])
        if self._group is not None:
            packed[self._group.rank()] = checksum
            dist.all_reduce(packed, group=self._group)
            self._disagreement |= (packed[:num_ranks] != checksum).any()
        return rows

    def check(self) -> None:
        """Raises if ranks have disagreed since the start; waits for the device.

        Raises:
            RanksDisagreeError: if so; the ranks' weights are no longer those of one model.
        """
        if bool(self._disagreement):
            raise RanksDisagreeError(
                "ranks disagree on what to exchange: they are at different steps or run different configurations; "
                "stop, and resume all ranks from one checkpoint"
            )


def gather_rows(parts: list[Tensor], num_rows: list[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Whole matrices on all ranks from every rank's rows of them, in one collective.

    Rows that are split evenly need only be gathered: each rank sends half of what the sum in `RowExchange` would take.

    Args:
        parts: [rows/ranks, width] each, of one type, cut as parameters are.
        num_rows: of each whole matrix.

    Returns:
        [rows, width] each.
    """
    num_ranks = group.size()
    heights = [rows_per_rank(rows, num_ranks) for rows in num_rows]
    sizes = [height * part.shape[1] for height, part in zip(heights, parts, strict=True)]
    length = padded_length(sum(sizes))
    packed = parts[0].new_zeros(length)
    places = [
        flat[: part.numel()].view(part.shape)
        for flat, part in zip(packed[: sum(sizes)].split(sizes), parts, strict=True)
    ]
    copy_all_(places, parts)
    gathered = packed.new_empty(num_ranks, length)
    dist.all_gather(list(gathered.unbind()), packed, group=group)
    # What fills up the last ranks' parts comes after all rows.
    return [
        columns.reshape(num_ranks * height, -1)[:rows]
        for columns, height, rows in zip(
            gathered[:, : sum(sizes)].split(sizes, dim=1), heights, num_rows, strict=True
        )
    ]


def padded_length(num_words: int) -> int:
    """The length at which so many words travel: up to an eighth more.

    Ranks whose plans differ a little in length still meet in one collective, nearly always, and are found out.
    """
    unit = 1 << max(10, (num_words - 1).bit_length() - 4)
    return -(-num_words // unit) * unit


def owned_segments(tensor: Tensor, spans: Spans) -> Iterator[tuple[slice, slice]]:
    """The parts of `spans` that this rank holds: (positions within the spans' rows, places in the local part)."""
    held = row_range(tensor)
    position = 0
    for span in spans:
        start, stop = max(span.start, held.start), min(span.stop, held.stop)
        if start < stop:
            yield (
                slice(position + start - span.start, position + stop - span.start),
                slice(start - held.start, stop - held.start),
            )
        position += len(span)


def write_rows_(tensors: list[Tensor], spans: list[Spans], rows: list[Tensor]) -> None:
    """Writes `rows[i]` [wanted, width] to the rows `spans[i]` of `tensors[i]`, where this rank holds them."""
    segments = [
        (local(tensor)[held], values[into])
        for tensor, tensor_spans, values in zip(tensors, spans, rows, strict=True)
        for into, held in owned_segments(tensor, tensor_spans)
    ]
    copy_all_([destination for destination, _ in segments], [source for _, source in segments])


def copy_all_(destinations: list[Tensor], sources: list[Tensor]) -> None:
    """Copies each source into its destination, in few operations; see `by_layout`."""
    for into, values in by_layout(destinations, sources):
        torch._foreach_copy_(into, values)


def by_layout(*lists: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Lists of as many tensors each, cut into pieces: contiguous entries apart from others, and each list of one type.

    CUDA's operations on lists take a few kernels for contiguous tensors of one type, but one kernel for every entry of the
    lists as soon as a single one is something else, such as columns of a matrix. (torch/aten, ForeachUtils.h)
    """
    pieces: defaultdict[tuple[bool, tuple[torch.dtype, ...]], list[tuple[Tensor, ...]]] = defaultdict(list)
    for entries in zip(*lists, strict=True):
        is_contiguous = all(tensor.is_contiguous() for tensor in entries)
        pieces[is_contiguous, tuple(tensor.dtype for tensor in entries)].append(entries)
    for piece in pieces.values():
        yield tuple(map(list, zip(*piece, strict=True)))


def _held_rows(num_rows: int, mesh: DeviceMesh) -> range:
    """The rows of a tensor of `num_rows` that this rank holds.

    In integers; torch's function for any placement makes tensors on the way, for every call.
    """
    dim = mesh.ndim - 1
    chunk = rows_per_rank(num_rows, mesh.size(dim))
    start = min(mesh.get_local_rank(dim) * chunk, num_rows)
    stop = min(start + chunk, num_rows)
    return range(start, stop) if start < stop else range(0)


def _num_words(request: RowRequest) -> int:
    # In 32-bit words, even, so that what follows may hold 64-bit numbers.
    num_bytes = request.num_rows * request.tensor.shape[1] * request.tensor.element_size()
    return -(-num_bytes // 8) * 2

"""Candidates in host memory, copied to and from the device while it computes."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from switchtitan.distributed.host_copies import CopyToDevice, CopyToHost, HostCopies
from switchtitan.distributed.row_exchange import RowRequest
from switchtitan.distributed.shards import ShardedRows, copy_all_
from switchtitan.methods.lowrank import LowRankLinear
from switchtitan.methods.switchlora.candidates import Candidates, candidate_rows, cast_all
from switchtitan.methods.switchlora.schedule import FACTORS, LayerSwitch


@dataclass(frozen=True)
class _Fetched:
    """Candidates that a step will take, packed into one tensor."""

    switches: list[LayerSwitch]
    shapes: list[tuple[int, int]]
    """[k, in] and [k, out] for each switch."""
    copy: CopyToDevice


@dataclass(frozen=True)
class _Returning:
    """Vectors that a step has put back, packed into one tensor."""

    switches: list[LayerSwitch]
    places: list[Tensor]
    """Their destinations: views of the layers' buffers."""
    copy: CopyToHost


class HostCandidates(Candidates):
    """Like `StoredCandidates`, with buffers in host memory.

    The plan of the next step is known one step ahead, so its candidates are prefetched. Outgoing
    vectors are copied back while the device computes. Each direction takes one copy for all layers,
    with pinned memory if the device is a GPU. The host waits for the vectors of the second-to-last
    step, whose copy has finished by then. It waits for those of the last step only if the next step
    takes some of them.
    """

    def __init__(self, layers: list[LowRankLinear]) -> None:
        self._buffers = candidate_rows(layers)
        self._device, self._dtype = layers[0].lora_a.device, layers[0].lora_a.dtype
        self._dtype_on_host = self._buffers[0][0].dtype
        self._copies = HostCopies(self._device)
        self._fetched: _Fetched | None = None
        self._returning: deque[_Returning] = deque()

    def row_requests(self, switches: list[LayerSwitch]) -> list[RowRequest]:
        return [
            RowRequest(ShardedRows(vectors), (range(len(vectors)),))
            for vectors in self._fetched_for(switches)
        ]

    def take(self, switches: list[LayerSwitch], gathered: list[Tensor]) -> list[Tensor]:
        self._fetched = None
        return cast_all(gathered, self._dtype)

    def put_back(self, switches: list[LayerSwitch], vectors: list[Tensor]) -> None:
        buffers = [buffer for switch in switches for buffer in self._buffers[switch.layer]]
        slots = [switch.slots_out for switch in switches for _ in FACTORS]
        pairs = [
            pair
            for buffer, wanted, rows in zip(buffers, slots, vectors, strict=True)
            for pair in buffer.paired(wanted, rows)
        ]
        places, rows_held = [place for place, _ in pairs], [rows for _, rows in pairs]
        packed = torch.empty(
            sum(map(Tensor.numel, places)), dtype=self._dtype_on_host, device=self._device
        )
        copy_all_(
            list(zip(_cut(packed, [rows.shape for rows in rows_held]), rows_held, strict=True))
        )
        self._returning.append(_Returning(switches, places, self._copies.to_host(packed)))

    def prefetch(self, switches: list[LayerSwitch]) -> None:
        # Each holds pinned memory.
        while len(self._returning) > 1:
            self._write_back()
        self._fetched = self._fetch(switches)

    def flush(self) -> None:
        while self._returning:
            self._write_back()

    def discard(self) -> None:
        self._fetched = None
        while self._returning:
            self._returning.popleft().copy.wait()

    def _fetched_for(self, switches: list[LayerSwitch]) -> list[Tensor]:
        """Returns these switches' candidates on the device, fetching them if not prefetched."""
        if self._fetched is None or self._fetched.switches != switches:
            self._fetched = self._fetch(switches)
        return _cut(self._fetched.copy.wait(), self._fetched.shapes)

    def _fetch(self, switches: list[LayerSwitch]) -> _Fetched:
        while any(_takes_returning(switches, returning.switches) for returning in self._returning):
            self._write_back()
        buffers = [
            (buffer, switch) for switch in switches for buffer in self._buffers[switch.layer]
        ]
        shapes = [(switch.num_vectors, buffer.width) for buffer, switch in buffers]
        # Rows of other ranks are zeros: the exchange sums over ranks.
        packed = self._copies.zeros_on_host(sum(map(prod, shapes)), self._dtype_on_host)
        copy_all_(
            [
                (place, held)
                for (buffer, switch), rows in zip(buffers, _cut(packed, shapes), strict=True)
                for held, place in buffer.paired(switch.slots_in, rows)
            ]
        )
        return _Fetched(switches, shapes, self._copies.to_device(packed))

    def _write_back(self) -> None:
        """Writes the oldest vectors in flight to their buffers."""
        returning = self._returning.popleft()
        vectors = _cut(returning.copy.wait(), [place.shape for place in returning.places])
        copy_all_(list(zip(returning.places, vectors, strict=True)))


def _cut(packed: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Splits a flat tensor into views of these shapes."""
    pieces = packed.split([prod(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _takes_returning(taking: list[LayerSwitch], returning: list[LayerSwitch]) -> bool:
    """Whether a layer takes a candidate that is still being copied back."""
    by_layer = {switch.layer: switch for switch in returning}
    return any(
        _overlap(switch, by_layer[switch.layer]) for switch in taking if switch.layer in by_layer
    )


def _overlap(taking: LayerSwitch, returning: LayerSwitch) -> bool:
    return any(
        into.start < out.stop and out.start < into.stop
        for into in taking.slots_in
        for out in returning.slots_out
    )

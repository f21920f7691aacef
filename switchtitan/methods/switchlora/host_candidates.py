"""Candidates in host memory, on their way to and from the device while it works on something else."""

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
from switchtitan.methods.switchlora.candidates import candidate_rows, cast_all
from switchtitan.methods.switchlora.schedule import FACTORS, LayerSwitch


@dataclass(frozen=True)
class _Fetched:
    """Candidates that a step will take, in one piece."""

    switches: list[LayerSwitch]
    shapes: list[tuple[int, int]]
    """[k, in] and [k, out] for each switch."""
    copy: CopyToDevice


@dataclass(frozen=True)
class _Returning:
    """Vectors that a step has put back, in one piece."""

    switches: list[LayerSwitch]
    places: list[Tensor]
    """Where they belong, views of the layers' buffers."""
    copy: CopyToHost


class HostCandidates:
    """As `StoredCandidates`, in buffers that stay in host memory.

    The ring says a step ahead which candidates are taken, so they are fetched before that step; vectors that leave are copied
    back while the device works on. Either is one copy for all layers, from and to page-locked memory if the device is a GPU.
    The host waits for vectors of the step before the last, which have left the device long since, and for those of the last
    step only if the ring is so short that they are taken again at once.
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

    def put_back_(self, switches: list[LayerSwitch], vectors: list[Tensor]) -> None:
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
        # Each holds page-locked memory.
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
        """Candidates for these switches, on the device, as `_Fetched.shapes` says; fetched now unless they were before."""
        if self._fetched is None or self._fetched.switches != switches:
            self._fetched = self._fetch(switches)
        return _cut(self._fetched.copy.wait(), self._fetched.shapes)

    def _fetch(self, switches: list[LayerSwitch]) -> _Fetched:
        while any(_takes_what_comes(switches, returning.switches) for returning in self._returning):
            self._write_back()
        buffers = [
            (buffer, switch) for switch in switches for buffer in self._buffers[switch.layer]
        ]
        shapes = [(switch.num_vectors, buffer.width) for buffer, switch in buffers]
        # Zeros stay in place of rows that other ranks hold: the exchange adds them up.
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
        """Writes the vectors that have been longest on their way to where they belong."""
        returning = self._returning.popleft()
        vectors = _cut(returning.copy.wait(), [place.shape for place in returning.places])
        copy_all_(list(zip(returning.places, vectors, strict=True)))


def _cut(packed: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The pieces that a flat tensor consists of, as views of these shapes."""
    pieces = packed.split([prod(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _takes_what_comes(taking: list[LayerSwitch], returning: list[LayerSwitch]) -> bool:
    """Whether some layer takes in a candidate that is on its way back."""
    coming = {switch.layer: switch for switch in returning}
    return any(_meet(switch, coming[switch.layer]) for switch in taking if switch.layer in coming)


def _meet(taking: LayerSwitch, returning: LayerSwitch) -> bool:
    return any(
        into.start < out.stop and out.start < into.stop
        for into in taking.slots_in
        for out in returning.slots_out
    )

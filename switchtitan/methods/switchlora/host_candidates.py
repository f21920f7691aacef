"""Candidates in host memory, on their way to and from the device while it works on something else."""

from collections import deque
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from switchtitan.distributed.host_copies import CopyToDevice, CopyToHost, HostCopies
from switchtitan.distributed.shards import RowRequest, copy_all_, local, owned_segments
from switchtitan.methods.lowrank import LowRankLinear
from switchtitan.methods.switchlora.candidates import Switches, TakenVectors
from switchtitan.methods.switchlora.schedule import LayerSwitch
from switchtitan.methods.switchlora.switch import column_views, split_columns


@dataclass(frozen=True)
class _Fetched:
    """Candidates that a step will take, in one piece."""

    switches: Switches
    shapes: list[tuple[int, ...]]
    """Of A's rows [k, in] of each layer, then of B's columns [out, k]."""
    copy: CopyToDevice


@dataclass(frozen=True)
class _Returning:
    """Vectors that a step has put back, in one piece."""

    switches: Switches
    places: list[Tensor]
    """Where they belong, views of the layers' buffers."""
    copy: CopyToHost


class HostCandidates:
    """As `StoredCandidates`, in buffers that stay in host memory.

    The ring says a step ahead which candidates are taken, so they are fetched before that step; vectors that leave travel while
    the device goes on. Either is one copy for all layers, from and to page-locked memory where the device is a GPU. The host
    waits for vectors of the step before the last, which have left the device long since, and for those of the last step only
    where the ring is so short that they are taken again at once.
    """

    def __init__(self, layers: list[LowRankLinear]) -> None:
        self._candidates_a = [layer.get_buffer("candidates_a") for layer in layers]
        self._candidates_b = [layer.get_buffer("candidates_b") for layer in layers]
        self._device = layers[0].lora_a.device
        self._dtype = self._candidates_a[0].dtype
        self._copies = HostCopies(self._device)
        self._fetched: _Fetched | None = None
        self._returning: deque[_Returning] = deque()

    def row_requests(self, switches: Switches) -> list[RowRequest]:
        rows = self._fetched_for(switches)[: len(switches)]
        return [RowRequest(vectors, (range(len(vectors)),)) for vectors in rows]

    def take(self, switches: Switches, gathered: list[Tensor]) -> list[TakenVectors]:
        columns = self._fetched_for(switches)[len(switches) :]
        self._fetched = None
        return list(map(TakenVectors, gathered, columns))

    def put_back_(self, switches: Switches, rows: list[Tensor], columns: list[Tensor]) -> None:
        places, vectors = [], []
        for (layer, plan), layer_rows, layer_columns in zip(switches.items(), rows, columns, strict=True):
            buffer = self._candidates_a[layer]
            for into, held in owned_segments(buffer, plan.slots_out):
                places.append(local(buffer)[held])
                vectors.append(layer_rows[into])
            places += column_views(local(self._candidates_b[layer]), plan.slots_out)
            vectors += split_columns(layer_columns, plan.slots_out)
        packed = torch.empty(sum(map(Tensor.numel, vectors)), dtype=self._dtype, device=self._device)
        copy_all_(_cut(packed, [part.shape for part in vectors]), vectors)
        self._returning.append(_Returning(switches, places, self._copies.to_host(packed)))

    def prefetch(self, switches: Switches) -> None:
        # Each holds page-locked memory.
        while len(self._returning) > 1:
            self._land()
        self._fetched = self._fetch(switches)

    def settle(self) -> None:
        while self._returning:
            self._land()

    def forget(self) -> None:
        self._fetched = None
        while self._returning:
            self._returning.popleft().copy.wait()

    def _fetched_for(self, switches: Switches) -> list[Tensor]:
        """Candidates for these switches, on the device, as `_Fetched.shapes` says; fetched now unless they were before."""
        if self._fetched is None or self._fetched.switches != switches:
            self._fetched = self._fetch(switches)
        return _cut(self._fetched.copy.wait(), self._fetched.shapes)

    def _fetch(self, switches: Switches) -> _Fetched:
        while any(_takes_what_comes(switches, returning.switches) for returning in self._returning):
            self._land()
        buffers_a = [self._candidates_a[layer] for layer in switches]
        parts_b = [local(self._candidates_b[layer]) for layer in switches]
        plans = list(switches.values())
        shapes: list[tuple[int, ...]] = [
            *((plan.num_vectors, buffer.shape[1]) for buffer, plan in zip(buffers_a, plans, strict=True)),
            *((len(part), plan.num_vectors) for part, plan in zip(parts_b, plans, strict=True)),
        ]
        # Zeros stay where other ranks hold A's rows: the exchange adds them up.
        packed = self._copies.zeros_on_host(sum(map(prod, shapes)), self._dtype)
        into = _cut(packed, shapes)
        rows = [
            (destination[wanted], local(buffer)[held])
            for destination, buffer, plan in zip(into[: len(plans)], buffers_a, plans, strict=True)
            for wanted, held in owned_segments(buffer, plan.slots_in)
        ]
        columns = [
            pair
            for destination, part, plan in zip(into[len(plans) :], parts_b, plans, strict=True)
            for pair in zip(
                split_columns(destination, plan.slots_in), column_views(part, plan.slots_in), strict=True
            )
        ]
        copy_all_([place for place, _ in rows + columns], [value for _, value in rows + columns])
        return _Fetched(switches, shapes, self._copies.to_device(packed))

    def _land(self) -> None:
        """Writes the vectors that have been longest on their way to where they belong."""
        returning = self._returning.popleft()
        copy_all_(returning.places, _cut(returning.copy.wait(), [place.shape for place in returning.places]))


def _cut(packed: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """The pieces that a flat tensor consists of, as views of these shapes."""
    pieces = packed.split([prod(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _takes_what_comes(taking: Switches, returning: Switches) -> bool:
    """Whether some layer takes in a candidate that is on its way back."""
    return any(_meet(plan, returning[layer]) for layer, plan in taking.items() if layer in returning)


def _meet(taking: LayerSwitch, returning: LayerSwitch) -> bool:
    return any(
        into.start < out.stop and out.start < into.stop
        for into in taking.slots_in
        for out in returning.slots_out
    )

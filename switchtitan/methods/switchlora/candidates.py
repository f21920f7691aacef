"""Candidates of all layers: drawn when needed, or stored on the device or in host memory.

Lists of vectors hold two tensors for each switch, A's then B's: [k, in], [k, out], [k, in], ...
"""

from collections import deque
from collections.abc import Sequence
from math import prod
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from switchtitan.distributed.copies import CopyToHost, HostCopies, to_device
from switchtitan.distributed.random import advance64, as_uniform, splitmix64
from switchtitan.distributed.rows import RowRequest
from switchtitan.distributed.shards import ShardedRows, Spans, copy_all_, write_rows_
from switchtitan.methods.lowrank import LowRankLinear
from switchtitan.methods.switchlora.plan import FACTORS, Switch

BUFFERS = ("candidates_a", "candidates_b")
"""Local names of the buffers of stored candidates, [c, in] and [c, out]."""


class Candidates(Protocol):
    """The candidates of all layers."""

    def row_requests(self, switches: list[Switch]) -> list[RowRequest]:
        """Returns the rows to gather from all ranks before `take`."""
        ...

    def take(self, switches: list[Switch], gathered: list[Tensor]) -> list[Tensor]:
        """Returns the candidates in `slots_in` of each switch, unsharded.

        Args:
            gathered: the rows that `row_requests` listed.
        """
        ...

    def put_back(self, switches: list[Switch], vectors: list[Tensor]) -> None:
        """Copies the outgoing vectors of each switch, unsharded, to its `slots_out`."""
        ...

    def flush(self) -> None:
        """Waits until all vectors put back are in the buffers that a checkpoint saves."""
        return None

    def discard(self) -> None:
        """Drops vectors in flight, after a checkpoint was loaded into the buffers."""
        return None

    def replicated(self) -> dict[str, Tensor]:
        """Returns what the candidates follow from, apart from the buffers; equal on every rank."""
        return {}


class DrawnCandidates(Candidates):
    """Constant candidates, drawn again whenever they are needed. Outgoing vectors are dropped.

    Every rank draws full vectors, so nothing is stored or sent.

    Args:
        keys: int64, from which the candidates of A and B of each layer are drawn, [layers, 2].
        bounds: of the uniform distribution that they are drawn from, fp32 [layers, 2].
    """

    def __init__(self, layers: Sequence[LowRankLinear], keys: Tensor, bounds: Tensor) -> None:
        self._keys, self._bounds, self._device = keys, bounds, layers[0].lora_a.device
        self._dtype = layers[0].lora_a.dtype
        self._widths = np.array([(layer.in_features, layer.out_features) for layer in layers])

    def row_requests(self, switches: list[Switch]) -> list[RowRequest]:
        return []

    def take(self, switches: list[Switch], gathered: list[Tensor]) -> list[Tensor]:
        if not switches:
            return []
        owners = np.array([(switch.layer, factor) for switch in switches for factor in FACTORS])
        slots = [_indices(switch.slots_in) for switch in switches for _ in FACTORS]
        widths, counts = self._widths[tuple(owners.T)], np.array([len(some) for some in slots])
        of_vector = tuple(torch.from_numpy(owners.repeat(counts, axis=0).T))
        vectors = draw_of_widths(
            splitmix64(self._keys[of_vector], torch.from_numpy(np.concatenate(slots))),
            self._bounds[of_vector],
            widths.repeat(counts),
            self._device,
        ).to(self._dtype)
        parts = vectors.split((counts * widths).tolist())
        return [part.view(-1, width) for part, width in zip(parts, widths.tolist(), strict=True)]

    def put_back(self, switches: list[Switch], vectors: list[Tensor]) -> None:
        """Drops them."""

    def replicated(self) -> dict[str, Tensor]:
        return {"switch.candidate_keys": self._keys, "switch.candidate_bounds": self._bounds}


class StoredCandidates(Candidates):
    """Candidates in the layers' buffers. A vector that is switched out is stored and returns as
    trained (SwitchLoRA, arXiv 2406.06564, Algorithm 1)."""

    def __init__(self, layers: Sequence[LowRankLinear]) -> None:
        self._buffers = [
            [ShardedRows(layer.get_buffer(name)) for name in BUFFERS] for layer in layers
        ]

    def row_requests(self, switches: list[Switch]) -> list[RowRequest]:
        return [
            RowRequest(buffer, switch.slots_in)
            for switch in switches
            for buffer in self._buffers[switch.layer]
        ]

    def take(self, switches: list[Switch], gathered: list[Tensor]) -> list[Tensor]:
        return gathered

    def put_back(self, switches: list[Switch], vectors: list[Tensor]) -> None:
        buffers = [buffer for switch in switches for buffer in self._buffers[switch.layer]]
        write_rows_(buffers, [switch.slots_out for switch in switches for _ in FACTORS], vectors)


class HostCandidates(StoredCandidates):
    """Like `StoredCandidates`, with buffers in host memory.

    Each direction takes one copy for all layers, in another stream. The host waits for the vectors
    of the second-to-last step, whose copy has finished by then. It waits for those of the last step
    only if this one takes some of them.
    """

    def __init__(self, layers: Sequence[LowRankLinear]) -> None:
        super().__init__(layers)
        self._device, self._dtype = layers[0].lora_a.device, layers[0].lora_a.dtype
        self._copies = HostCopies(self._device)
        self._returning: deque[tuple[list[Switch], list[Tensor], CopyToHost]] = deque()

    def row_requests(self, switches: list[Switch]) -> list[RowRequest]:
        while len(self._returning) > 1 or any(
            _takes_any(switches, returning) for returning, _, _ in self._returning
        ):
            self._write_back()
        held = super().row_requests(switches)
        shapes = [(sum(map(len, spans)), buffer.width) for buffer, spans in held]
        # Rows of other ranks are zeros: the exchange sums over ranks.
        packed = self._copies.zeros_on_host(sum(map(prod, shapes)), self._dtype)
        pairs = [
            (place, row)
            for (buffer, spans), rows in zip(held, _cut(packed, shapes), strict=True)
            for row, place in buffer.paired(spans, rows)
        ]
        copy_all_(pairs)
        on_device = _cut(self._copies.to_device(packed), shapes)
        return [RowRequest(ShardedRows(rows), (range(len(rows)),)) for rows in on_device]

    def put_back(self, switches: list[Switch], vectors: list[Tensor]) -> None:
        buffers = [buffer for switch in switches for buffer in self._buffers[switch.layer]]
        slots = [switch.slots_out for switch in switches for _ in FACTORS]
        pairs = [
            pair
            for buffer, spans, rows in zip(buffers, slots, vectors, strict=True)
            for pair in buffer.paired(spans, rows)
        ]
        num_elements = sum(rows.numel() for _, rows in pairs)
        packed = torch.empty(num_elements, dtype=self._dtype, device=self._device)
        shapes = [rows.shape for _, rows in pairs]
        copy_all_(list(zip(_cut(packed, shapes), [rows for _, rows in pairs], strict=True)))
        places = [place for place, _ in pairs]
        self._returning.append((switches, places, self._copies.to_host(packed)))

    def flush(self) -> None:
        while self._returning:
            self._write_back()

    def discard(self) -> None:
        while self._returning:
            self._returning.popleft()[2].wait()

    def _write_back(self) -> None:
        """Writes the oldest vectors in flight to their buffers."""
        _, places, copy = self._returning.popleft()
        vectors = _cut(copy.wait(), [place.shape for place in places])
        copy_all_(list(zip(places, vectors, strict=True)))


def draw_of_widths(
    keys: Tensor, bounds: Tensor, widths: np.ndarray, device: torch.device
) -> Tensor:
    """Draws vectors of different widths, one after the other, with the values of
    `seeds.draw_vectors`.

    The number of kernels depends neither on the number of vectors nor on their widths.

    Args:
        keys: SplitMix64 of each factor's key and slot, [vectors] int64, on the CPU.
        bounds: [vectors] fp32, on the CPU.
        widths: [vectors] int64.

    Returns:
        [sum of widths] fp32, on `device`.
    """
    num_elements = int(widths.sum())
    starts = widths.cumsum(0) - widths
    # Advanced so that the index `start` draws a vector's element 0.
    keys = advance64(keys, torch.from_numpy(-starts))
    table = to_device(torch.stack([keys, torch.from_numpy(widths)]), device)
    of_element = torch.repeat_interleave(table[1], output_size=num_elements)
    bits = splitmix64(table[0][of_element], torch.arange(num_elements, device=device))
    return as_uniform(bits) * to_device(bounds, device)[of_element]


def _indices(spans: Spans) -> np.ndarray:
    return np.concatenate([np.arange(span.start, span.stop) for span in spans])


def _cut(packed: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Splits a flat tensor into views of these shapes."""
    pieces = packed.split([prod(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _takes_any(taking: list[Switch], returning: list[Switch]) -> bool:
    """Whether a layer takes a candidate that is still being copied back."""
    slots_out = {switch.layer: switch.slots_out for switch in returning}
    return any(
        into.start < out.stop and out.start < into.stop
        for switch in taking
        for into in switch.slots_in
        for out in slots_out.get(switch.layer, ())
    )

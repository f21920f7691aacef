"""Candidates of all layers: drawn when needed, or stored on the device or in host memory.

Lists of vectors hold two tensors for each switch, A's then B's: [k, in], [k, out], [k, in], ...
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from switchtitan.distributed.copies import CopyToHost, to_device
from switchtitan.distributed.rows import (
    RowSpans,
    ShardedRows,
    copy_all_,
    cut,
    pack_rows,
    paired_rows,
)
from switchtitan.methods.adapter.linear import AdapterLinear
from switchtitan.methods.switchlora.plan import FACTOR_A, FACTOR_B, Switch
from switchtitan.numerics.random import advance64, as_uniform, splitmix64

BUFFERS = ("candidates_a", "candidates_b")
"""Local names of the buffers of stored candidates, [c, in] and [c, out]."""


class Candidates:
    """Vectors that replace those that are switched out. By default nothing is stored or sent, and
    outgoing vectors are dropped."""

    def row_requests(self, switches: list[Switch]) -> list[RowSpans]:
        """Returns the rows to gather from all ranks before `take`."""
        return []

    def take(self, switches: list[Switch], gathered: list[Tensor]) -> list[Tensor]:
        """Returns the candidates in `slots_in` of each switch, unsharded; by default
        `gathered`, the rows that `row_requests` listed."""
        return gathered

    def put_back(self, switches: list[Switch], vectors: list[Tensor]) -> None:
        """Copies the outgoing vectors of each switch, unsharded, to its `slots_out`."""

    def flush(self) -> None:
        """Waits until all vectors put back are in the buffers that a checkpoint saves."""

    def replicated(self) -> dict[str, Tensor]:
        """Returns what the candidates follow from, apart from the buffers; equal on every rank."""
        return {}


class DrawnCandidates(Candidates):
    """Constant candidates: every rank draws full vectors again whenever they are needed.

    `keys` of A and B, [layers, 2] int64, are those of the initial factors, copies of candidates.
    """

    def __init__(self, layers: Sequence[AdapterLinear], keys: Tensor) -> None:
        self._keys, self._like = keys, layers[0].lora_a
        self._bounds = torch.tensor([layer.bounds for layer in layers], dtype=torch.float32)
        self._widths = np.array([(layer.in_features, layer.out_features) for layer in layers])

    def take(self, switches: list[Switch], gathered: list[Tensor]) -> list[Tensor]:
        pairs = [(switch, factor) for switch in switches for factor in (FACTOR_A, FACTOR_B)]
        slots = [slot for switch, _ in pairs for span in switch.slots_in for slot in span]
        owners = np.array([(switch.layer, factor) for switch, factor in pairs])  # indices of tables
        counts = np.array([switch.num_vectors for switch, _ in pairs])
        widths = self._widths[tuple(owners.T)]
        owner = tuple(torch.from_numpy(owners.repeat(counts, axis=0).T))
        keys = splitmix64(self._keys[owner], torch.tensor(slots))
        bounds, device = self._bounds[owner], self._like.device
        vectors = draw_of_widths(keys, bounds, widths.repeat(counts), device)
        return cut(vectors.to(self._like.dtype), zip(counts.tolist(), widths.tolist(), strict=True))

    def replicated(self) -> dict[str, Tensor]:
        return {"switch.candidate_keys": self._keys}


class StoredCandidates(Candidates):
    """Candidates in the layers' buffers. A vector that is switched out is stored and returns as
    trained (SwitchLoRA, arXiv 2406.06564, Algorithm 1)."""

    def __init__(self, layers: Sequence[AdapterLinear]) -> None:
        self._buffers = [
            [ShardedRows(layer.get_buffer(name)) for name in BUFFERS] for layer in layers
        ]

    def row_requests(self, switches: list[Switch]) -> list[RowSpans]:
        return [
            RowSpans(buffer, switch.slots_in)
            for switch in switches
            for buffer in self._buffers[switch.layer]
        ]

    def put_back(self, switches: list[Switch], vectors: list[Tensor]) -> None:
        copy_all_(self._returning(switches, vectors))

    def _returning(
        self, switches: list[Switch], vectors: list[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Returns (place in a buffer, vectors that go there) for this rank's rows."""
        places = [
            RowSpans(buffer, switch.slots_out)
            for switch in switches
            for buffer in self._buffers[switch.layer]
        ]
        return paired_rows(places, vectors)


class HostCandidates(StoredCandidates):
    """Like `StoredCandidates`, with buffers in host memory.

    Each direction takes one copy for all layers. The host waits for the vectors of the
    second-to-last step with switches, whose copy has finished by then.
    """

    def __init__(self, layers: Sequence[AdapterLinear]) -> None:
        super().__init__(layers)
        self._device = layers[0].lora_a.device
        self._in_flight: deque[tuple[list[Tensor], CopyToHost]] = deque()
        # A slot is read again `spare` vectors after it was written, and a step in flight and the
        # one after it switch at most `rank`.
        spare = min(min(layer.plain_shape) - layer.rank for layer in layers)
        self._most_in_flight = 1 if spare >= layers[0].rank else 0

    def row_requests(self, switches: list[Switch]) -> list[RowSpans]:
        """Copies the requested rows to the device, after vectors that are due are in the buffers;
        returns those copies."""
        self._write_back_all_but(self._most_in_flight)
        # Rows of other ranks are zeros: the exchange sums over ranks.
        packed, wanted = pack_rows(super().row_requests(switches))
        on_device = cut(to_device(packed, self._device), [rows.shape for rows in wanted])
        return [RowSpans(ShardedRows(rows), (range(len(rows)),)) for rows in on_device]

    def put_back(self, switches: list[Switch], vectors: list[Tensor]) -> None:
        pairs = self._returning(switches, vectors)
        packed = vectors[0].new_empty(sum(rows.numel() for _, rows in pairs))
        pieces = cut(packed, [rows.shape for _, rows in pairs])
        copy_all_([(piece, rows) for piece, (_, rows) in zip(pieces, pairs, strict=True)])
        self._in_flight.append(([place for place, _ in pairs], CopyToHost(packed)))

    def flush(self) -> None:
        self._write_back_all_but(0)

    def _write_back_all_but(self, num_steps: int) -> None:
        """Writes vectors in flight to their buffers, but for the last steps with switches."""
        while len(self._in_flight) > num_steps:
            places, copy = self._in_flight.popleft()
            vectors = cut(copy.wait(), [place.shape for place in places])
            copy_all_(list(zip(places, vectors, strict=True)))


def draw_of_widths(
    keys: Tensor, bounds: Tensor, widths: np.ndarray, device: torch.device
) -> Tensor:
    """Draws vectors of different widths, [sum of widths] fp32 on `device`, as `draw_vectors` does,
    by equally many kernels for any number of them.

    Args:
        keys: SplitMix64 of each factor's key and slot, [vectors] int64, on the CPU.
        bounds, widths: [vectors], on the CPU.
    """
    starts = widths.cumsum(0) - widths
    # Advanced so that the index `start` draws a vector's element 0.
    keys = advance64(keys, torch.from_numpy(-starts))
    table = to_device(torch.stack([keys, torch.from_numpy(widths)]), device)
    vector = torch.repeat_interleave(table[1], output_size=int(widths.sum()))
    bits = splitmix64(table[0][vector], torch.arange(len(vector), device=device))
    return as_uniform(bits) * to_device(bounds, device)[vector]

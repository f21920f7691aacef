"""Sources of candidates: stored in buffers, or drawn when needed."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from switchtitan.distributed.row_exchange import RowRequest
from switchtitan.distributed.seeds import generator_for, splitmix64
from switchtitan.distributed.shards import ShardedRows, Spans, copy_all_, write_rows_
from switchtitan.methods.lowrank import LowRankLinear
from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.init import (
    candidate_bounds,
    candidates_key,
    draw_vectors_of_widths,
)
from switchtitan.methods.switchlora.schedule import FACTORS, LayerSwitch


class Candidates(Protocol):
    """The candidates of all layers.

    Lists of vectors hold two tensors for each switch, A's then B's: [k, in], [k, out], [k, in], ...
    """

    def row_requests(self, switches: list[LayerSwitch]) -> list[RowRequest]:
        """Returns the rows to gather from all ranks before `take`."""
        ...

    def take(self, switches: list[LayerSwitch], gathered: list[Tensor]) -> list[Tensor]:
        """Returns the candidates in `slots_in` of each switch, unsharded, in the factors' dtype.

        Args:
            gathered: the rows that `row_requests` listed.
        """
        ...

    def put_back(self, switches: list[LayerSwitch], vectors: list[Tensor]) -> None:
        """Copies the outgoing vectors of each switch, unsharded, to its `slots_out`."""
        ...

    def prefetch(self, switches: list[LayerSwitch]) -> None:
        """Starts to fetch the candidates of the next step. Default: nothing is fetched."""
        return None

    def flush(self) -> None:
        """Waits until all vectors put back are in the buffers that a checkpoint saves. Default:
        `put_back` has written them."""
        return None

    def discard(self) -> None:
        """Drops copies in flight after a checkpoint was loaded into the buffers. Default: none."""
        return None

    def replicated(self) -> dict[str, Tensor]:
        """Returns what determines the candidates and is the same on every rank. Default: the
        buffers only."""
        return {}


class StoredCandidates(Candidates):
    """Candidates in the layers' buffers `candidates_a` [c, in] and `candidates_b` [c, out].

    A vector that is switched out is stored and returns as trained (SwitchLoRA, arXiv 2406.06564,
    Algorithm 1).
    """

    def __init__(self, layers: list[LowRankLinear]) -> None:
        self._buffers = candidate_rows(layers)
        self._dtype = layers[0].lora_a.dtype

    def row_requests(self, switches: list[LayerSwitch]) -> list[RowRequest]:
        return [
            RowRequest(buffer, switch.slots_in)
            for switch in switches
            for buffer in self._buffers[switch.layer]
        ]

    def take(self, switches: list[LayerSwitch], gathered: list[Tensor]) -> list[Tensor]:
        return cast_all(gathered, self._dtype)

    def put_back(self, switches: list[LayerSwitch], vectors: list[Tensor]) -> None:
        write_rows_(
            [buffer for switch in switches for buffer in self._buffers[switch.layer]],
            [switch.slots_out for switch in switches for _ in FACTORS],
            vectors,
        )


class DrawnCandidates(Candidates):
    """Constant candidates, drawn again whenever they are needed. Outgoing vectors are dropped.

    Every rank draws full vectors, so nothing is stored or sent.

    Args:
        layers: by qualified name, all of one rank.
        seed: the job's seed, from which the layers' initial factors were drawn.
    """

    def __init__(
        self, config: SwitchLoraConfig, layers: dict[str, LowRankLinear], seed: int
    ) -> None:
        first = next(iter(layers.values())).lora_a
        self._dtype, self._device = first.dtype, first.device
        # [layers, 2] each.
        self._keys = torch.tensor(
            [
                [
                    candidates_key(generator_for(seed, f"{name}.{key}"))
                    for key in ("candidates_a", "candidates_b")
                ]
                for name in layers
            ]
        )
        self._bounds = torch.tensor(
            [
                candidate_bounds(config.init, layer.out_features, layer.in_features, layer.rank)
                for layer in layers.values()
            ],
            dtype=torch.float32,
        )
        self._widths = np.array(
            [(layer.in_features, layer.out_features) for layer in layers.values()]
        )

    def row_requests(self, switches: list[LayerSwitch]) -> list[RowRequest]:
        return []

    def take(self, switches: list[LayerSwitch], gathered: list[Tensor]) -> list[Tensor]:
        if not switches:
            return []
        pairs = [(switch, factor) for switch in switches for factor in FACTORS]
        counts = np.array([switch.num_vectors for switch, _ in pairs])
        owners = np.array([[switch.layer, factor] for switch, factor in pairs])
        widths = self._widths[tuple(owners.T)]
        slots = np.concatenate([_indices(switch.slots_in) for switch, _ in pairs])
        of_vector = tuple(torch.from_numpy(owners.repeat(counts, axis=0).T))
        vectors = draw_vectors_of_widths(
            splitmix64(self._keys[of_vector], torch.from_numpy(slots)),
            self._bounds[of_vector],
            widths.repeat(counts),
            self._device,
        ).to(self._dtype)
        parts = vectors.split((counts * widths).tolist())
        return [part.view(-1, width) for part, width in zip(parts, widths.tolist(), strict=True)]

    def put_back(self, switches: list[LayerSwitch], vectors: list[Tensor]) -> None:
        """Drops them."""

    def replicated(self) -> dict[str, Tensor]:
        return {"candidate_keys": self._keys, "candidate_bounds": self._bounds}


def candidate_rows(layers: list[LowRankLinear]) -> list[list[ShardedRows]]:
    """Returns the candidate buffers for A and B of each layer, [layers][2]."""
    return [
        [ShardedRows(layer.get_buffer(name)) for name in ("candidates_a", "candidates_b")]
        for layer in layers
    ]


def cast_all(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Casts tensors of one dtype in few operations; returns `tensors` if no cast is needed."""
    if not tensors or tensors[0].dtype == dtype:
        return tensors
    sizes = [tensor.numel() for tensor in tensors]
    pieces = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device).split(sizes)
    cast = [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]
    copy_all_(list(zip(cast, tensors, strict=True)))
    return cast


def _indices(spans: Spans) -> np.ndarray:
    return np.concatenate([np.arange(span.start, span.stop) for span in spans])

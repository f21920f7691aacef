"""Where the vectors that a switch takes in come from, and whether those it takes out are kept."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from switchtitan.distributed.seeds import generator_for
from switchtitan.distributed.shards import RowRequest, Spans, local, row_range, write_rows_
from switchtitan.methods.lowrank import LowRankLinear
from switchtitan.methods.splitmix import splitmix64
from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.draws import draw_vectors
from switchtitan.methods.switchlora.init import candidate_bounds, candidates_key
from switchtitan.methods.switchlora.schedule import LayerSwitch
from switchtitan.methods.switchlora.switch import take_columns, write_columns_

Switches = dict[int, LayerSwitch]
"""What is switched in a step, by the layer's place among all layers."""


@dataclass(frozen=True)
class TakenVectors:
    """The vectors that one layer's factors take in."""

    rows: Tensor
    """[k, in] for A, whole on every rank."""
    columns: Tensor
    """[out, k] for B, on this rank's rows of it."""


class Candidates(Protocol):
    """The candidates of all layers."""

    def row_requests(self, switches: Switches) -> list[RowRequest]:
        """Rows that must be gathered from all ranks before `take`."""
        ...

    def take(self, switches: Switches, gathered: list[Tensor]) -> list[TakenVectors]:
        """The candidates in `slots_in` of each switch; copies, in the type that candidates are kept in.

        Args:
            gathered: what `row_requests` asked for.
        """
        ...

    def put_back_(self, switches: Switches, rows: list[Tensor], columns: list[Tensor]) -> None:
        """Hands over what left A ([k, in], whole) and B ([out, k], this rank's rows) in each switch, for `slots_out`; the
        tensors may change afterwards."""
        ...

    def prefetch(self, switches: Switches) -> None:
        """Says what the next step will take, unless `forget` comes before it."""
        ...

    def settle(self) -> None:
        """Returns when all that was put back is where a checkpoint takes it from."""
        ...

    def forget(self) -> None:
        """Drops what was prefetched or is on its way back: a checkpoint's candidates have taken the place of all."""
        ...


class StoredCandidates:
    """Candidates in the layers' buffers `candidates_a` [c, in] and `candidates_b` [out, c], which vectors go back to.

    They come back with what they had learnt (SwitchLoRA, arXiv 2406.06564, Algorithm 1).
    """

    def __init__(self, layers: list[LowRankLinear]) -> None:
        self._candidates_a = [layer.get_buffer("candidates_a") for layer in layers]
        self._candidates_b = [layer.get_buffer("candidates_b") for layer in layers]

    def row_requests(self, switches: Switches) -> list[RowRequest]:
        return [RowRequest(self._candidates_a[layer], plan.slots_in) for layer, plan in switches.items()]

    def take(self, switches: Switches, gathered: list[Tensor]) -> list[TakenVectors]:
        columns = take_columns(
            [local(self._candidates_b[layer]) for layer in switches],
            [plan.slots_in for plan in switches.values()],
        )
        return list(map(TakenVectors, gathered, columns))

    def put_back_(self, switches: Switches, rows: list[Tensor], columns: list[Tensor]) -> None:
        slots = [plan.slots_out for plan in switches.values()]
        write_rows_([self._candidates_a[layer] for layer in switches], slots, rows)
        write_columns_([local(self._candidates_b[layer]) for layer in switches], slots, columns)

    def prefetch(self, switches: Switches) -> None:
        pass

    def settle(self) -> None:
        pass

    def forget(self) -> None:
        pass


class DrawnCandidates:
    """Candidates that never change: each is drawn when it is needed, always the same, and vectors that leave are dropped.

    Every rank draws A's rows whole and its own part of B's columns, so nothing is stored or sent.

    Args:
        layers: by qualified name, all of one rank.
        seed: the job's, which the layers' initial factors were drawn with.
    """

    def __init__(self, config: SwitchLoraConfig, layers: dict[str, LowRankLinear], seed: int) -> None:
        factor = next(iter(layers.values())).lora_a
        self._dtype = factor.dtype
        bounds = [
            candidate_bounds(config.init, layer.out_features, layer.in_features, layer.rank)
            for layer in layers.values()
        ]
        self._rows = _DrawnSide(
            [candidates_key(generator_for(seed, f"{name}.candidates_a")) for name in layers],
            [bound for bound, _ in bounds],
            [range(layer.in_features) for layer in layers.values()],
            factor.device,
        )
        self._columns = _DrawnSide(
            [candidates_key(generator_for(seed, f"{name}.candidates_b")) for name in layers],
            [bound for _, bound in bounds],
            [row_range(layer.lora_b) for layer in layers.values()],
            factor.device,
        )

    def row_requests(self, switches: Switches) -> list[RowRequest]:
        return []

    def take(self, switches: Switches, gathered: list[Tensor]) -> list[TakenVectors]:
        slots = {layer: plan.slots_in for layer, plan in switches.items()}
        rows, columns = self._rows.draw(slots), self._columns.draw(slots)
        return [
            TakenVectors(rows[layer].to(self._dtype), columns[layer].to(self._dtype).t())
            for layer in switches
        ]

    def put_back_(self, switches: Switches, rows: list[Tensor], columns: list[Tensor]) -> None:
        pass

    def prefetch(self, switches: Switches) -> None:
        pass

    def settle(self) -> None:
        pass

    def forget(self) -> None:
        pass


class _DrawnSide:
    """Drawn candidates for one factor of every layer.

    Args:
        keys, bounds: of each layer's candidates.
        elements: those of a vector that this rank needs.
    """

    def __init__(
        self, keys: list[int], bounds: list[float], elements: list[range], device: torch.device
    ) -> None:
        self._keys = torch.tensor(keys)
        self._bounds = torch.tensor(bounds, dtype=torch.float32)
        self._elements = elements
        self._device = device

    def draw(self, slots: dict[int, Spans]) -> dict[int, Tensor]:
        """The candidates in these slots by layer, [k, elements] each; layers of one width are drawn together."""
        groups: defaultdict[range, list[int]] = defaultdict(list)
        for layer in slots:
            groups[self._elements[layer]].append(layer)
        drawn: dict[int, Tensor] = {}
        for elements, layers in groups.items():
            counts = [sum(map(len, slots[layer])) for layer in layers]
            owners = torch.from_numpy(np.repeat(layers, counts))
            places = torch.from_numpy(
                np.concatenate(
                    [np.arange(span.start, span.stop) for layer in layers for span in slots[layer]]
                )
            )
            keys, bounds = splitmix64(self._keys[owners], places), self._bounds[owners]
            vectors = draw_vectors(self._on_device(keys), self._on_device(bounds), elements)
            drawn |= zip(layers, vectors.split(counts), strict=True)
        return drawn

    def _on_device(self, table: Tensor) -> Tensor:
        if self._device.type == "cuda":
            # Page-locked, since a copy from other memory waits for the device.
            table = table.pin_memory()
        return table.to(self._device, non_blocking=True)

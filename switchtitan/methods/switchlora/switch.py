"""Computations of a switch, on plain tensors or local shards: the fold and the freeze."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from switchtitan.distributed.host_copies import to_device
from switchtitan.distributed.shards import ShardedRows
from switchtitan.methods.lowrank.rounding import Rounding, add_product_
from switchtitan.methods.switchlora.schedule import FACTORS, VectorSpan


def fold_into_weight_(
    weight: Tensor,
    vectors_a: Tensor,
    vectors_b: Tensor,
    scale: float,
    rounding: Rounding | None = None,
) -> None:
    """Folds a switch into the frozen weight, so that the layer's output does not change.

    Keeps W + s B A constant: W += s (B[:, I] (A_old - A_new)[I] + (B_old - B_new)[:, J] A[J]), one
    update of rank 2k for vectors I of A and J of B, which are disjoint (SwitchLoRA, arXiv
    2406.06564, Algorithm 1).

    Args:
        weight: [out, in], changed in place. A shard [out/ranks, in] works the same.
        vectors_a: [2k, in], full rows on every rank: A_old - A_new in rows I, then A's rows J.
        vectors_b: [2k, out], or the columns of the shard's rows: B's rows I, then B_old - B_new in
            rows J.
        rounding: for a weight in bf16; the layer's output is then unchanged in expectation.
    """
    add_product_(weight, vectors_b.t(), vectors_a, scale, rounding)


def squared_norm_ratios(new: list[Tensor], old: list[Tensor]) -> Tensor:
    """Returns |new|^2 / |old|^2 of each vector, [vectors]; not finite if the old one is zero.

    Args:
        new, old: lists of [k, width], with the same shapes. Each width takes the same few
            operations for any number of vectors.
    """
    ratios: list[Tensor] = [rows.new_empty(0) for rows in old]
    for places in _places_of_each([rows.shape[1] for rows in old]).values():
        norms = [
            torch.linalg.vector_norm(torch.cat([rows[place] for place in places]), dim=1)
            for rows in (new, old)
        ]
        of_width = (norms[0] / norms[1]).square().split([len(old[place]) for place in places])
        for place, ratio in zip(places, of_width, strict=True):
            ratios[place] = ratio
    return torch.cat(ratios)


def scale_rows_(targets: list[ShardedRows], spans: list[range], factors: Tensor) -> None:
    """Multiplies the local ones of the rows `spans[i]` of `targets[i]`.

    Args:
        factors: [rows], one for each row of all spans; the same on every rank.
    """
    parts = factors.split([len(span) for span in spans])
    pairs = []
    for width, places in _places_of_each([target.width for target in targets]).items():
        of_width = torch.cat([parts[place] for place in places])[:, None]
        # As wide as the targets: a product of lists of equal shapes takes few kernels.
        rows = of_width.expand(-1, width).contiguous()
        pieces = rows.split([len(spans[place]) for place in places])
        for place, piece in zip(places, pieces, strict=True):
            pairs += targets[place].paired((spans[place],), piece)
    if pairs:
        torch._foreach_mul_([row for row, _ in pairs], [factor for _, factor in pairs])


class FreezeTimers:
    """Counters of the steps for which each vector is still frozen.

    Attributes:
        steps_left: [2, layers, rank] int32, on the device; the same on every rank.
    """

    def __init__(self, num_layers: int, rank: int, freeze_steps: int, device: torch.device) -> None:
        self._freeze_steps = freeze_steps
        self.steps_left = torch.zeros(
            len(FACTORS), num_layers, rank, dtype=torch.int32, device=device
        )

    def start(self, spans: list[VectorSpan]) -> None:
        """Freezes these vectors in this step and the next `freeze_steps` - 1."""
        fill_vectors_(self.steps_left, spans, self._freeze_steps)

    def update_mask(self) -> Tensor:
        """Returns [2, layers, rank] bool: true for vectors that are updated in this step."""
        return self.steps_left == 0

    def advance(self) -> None:
        """Ends a step."""
        self.steps_left.sub_(1).clamp_(min=0)


def fill_vectors_(table: Tensor, spans: list[VectorSpan], value: int) -> None:
    """Sets these vectors' entries in a table [2, layers, rank], with one copy and one kernel."""
    if spans:
        mask = np.zeros(table.shape, dtype=np.bool_)
        for factor, layer, vectors in spans:
            mask[factor, layer, vectors.start : vectors.stop] = True
        table.masked_fill_(to_device(torch.from_numpy(mask), table.device), value)


def places_in_table(table: Tensor, spans: list[VectorSpan]) -> Tensor:
    """Returns the indices of these vectors in a flattened table [2, layers, rank]."""
    _, num_layers, rank = table.shape
    starts = [(span.factor * num_layers + span.layer) * rank for span in spans]
    places = [
        start + np.arange(span.vectors.start, span.vectors.stop)
        for start, span in zip(starts, spans, strict=True)
    ]
    return to_device(torch.from_numpy(np.concatenate(places)), table.device)


def _places_of_each(values: Sequence[int]) -> dict[int, list[int]]:
    """Returns the places of each value."""
    places: dict[int, list[int]] = {}
    for place, value in enumerate(values):
        places.setdefault(value, []).append(place)
    return places

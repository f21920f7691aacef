"""Which vectors stand still."""

from typing import NamedTuple

import torch
from torch import Tensor

SIDE_A, SIDE_B = 0, 1
"""Places of A's rows and B's columns in tensors [2, layers, rank]."""


class VectorSpan(NamedTuple):
    """Neighbouring vectors of one factor of one layer."""

    side: int
    layer: int
    vectors: range

    def view(self, table: Tensor) -> Tensor:
        """Their entries in a table [2, layers, rank]."""
        return table[self.side, self.layer, self.vectors.start : self.vectors.stop]


class FreezeTimers:
    """Steps that each vector must still stand still.

    Attributes:
        steps_left: [2, layers, rank] int32, on the device; the same on every rank.
    """

    def __init__(self, num_layers: int, rank: int, freeze_steps: int, device: torch.device) -> None:
        self._freeze_steps = freeze_steps
        self.steps_left = torch.zeros(2, num_layers, rank, dtype=torch.int32, device=device)

    def start_(self, spans: list[VectorSpan]) -> None:
        """Makes these vectors stand still in this step and the next `freeze_steps` - 1."""
        timers = [span.view(self.steps_left) for span in spans]
        if timers:
            torch._foreach_zero_(timers)
            torch._foreach_add_(timers, self._freeze_steps)

    def moving(self) -> Tensor:
        """[2, layers, rank] bool: true for vectors that may move in this step."""
        return self.steps_left == 0

    def advance_(self) -> None:
        """Ends a step."""
        self.steps_left.sub_(1).clamp_(min=0)

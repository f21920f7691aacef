"""Which vectors stand still."""

import torch
from torch import Tensor

from switchtitan.methods.switchlora.vectors import FACTORS, VectorSpan, fill_vectors_


class FreezeTimers:
    """Steps for which each vector is still frozen.

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
        """[2, layers, rank] bool: true for vectors that are updated in this step."""
        return self.steps_left == 0

    def advance(self) -> None:
        """Ends a step."""
        self.steps_left.sub_(1).clamp_(min=0)

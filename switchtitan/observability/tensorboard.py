"""Scalars, histograms and texts for TensorBoard."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


class TensorBoardWriter:
    """Appends to the event files in `folder`.

    Args:
        start_step: steps done before this run. What an earlier, interrupted run wrote beyond them TensorBoard
            drops, so that no step has two points.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else 0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point per tag, readable at once."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def write_histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Adds one histogram per tag, of all values of its tensor, in bins whose widths grow with the values."""
        for tag, tensor in values.items():
            self._writer.add_histogram(tag, tensor, step)
        self._writer.flush()

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Shows `text` as it is, in a fixed-width font."""
        self._writer.add_text(tag, "\n".join(f"    {line}" for line in text.splitlines()), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

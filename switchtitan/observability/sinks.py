"""The interface of what a run's metrics are written to."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

HParam = bool | float | str
"""A value of the configuration, to compare runs by."""


class Sink(Protocol):
    """Something that a run's metrics are written to, on the main rank."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point per metric, by name, e.g. "loss/train"."""
        ...

    def write_histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Adds a histogram of all values of each tensor."""
        ...

    def write_markdown(self, name: str, text: str, step: int) -> None:
        """Adds a text."""
        ...

    def write_png(self, name: str, picture: bytes, width: int, height: int, step: int) -> None:
        """Adds a picture of this size in pixels."""
        ...

    def close(self, is_finished: bool) -> None:
        """Ends the run; `is_finished`: after its last step."""
        ...

"""The inside of the loss in chunks."""

from typing import Any

from switchtitan.models import loss
from switchtitan.models.loss import CrossEntropy


def align_rows(monkeypatch: Any, is_aligned: bool) -> None:
    """Pads rows of logits on a CPU as on a GPU, or does not."""
    devices = {"cpu"} if is_aligned else {"cuda"}
    monkeypatch.setattr(loss, "_DEVICES_WITH_ALIGNED_ROWS", devices)


def record_strides(cross_entropy: CrossEntropy) -> list[int]:
    """Returns a list to which each chunk adds its logits' stride of rows."""
    strides: list[int] = []
    compute = cross_entropy._loss_and_gradient

    def recorded(logits: Any, *args: Any) -> Any:
        strides.append(logits.stride(0))
        return compute(logits, *args)

    cross_entropy._loss_and_gradient = recorded
    return strides

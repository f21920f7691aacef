"""Copies between a device and host memory for which the host does not wait."""

import torch
from torch import Tensor


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """Copies a small host tensor to `device`; the host does not wait."""
    if device.type == "cuda":
        # Page-locked: a copy from pageable memory waits for the device.
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


class CopyToHost:
    """A copy to the host, after the work queued so far; complete at once on a CPU."""

    def __init__(self, source: Tensor) -> None:
        self._copy = torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
        self._copy.copy_(source, non_blocking=True)
        self._done: torch.cuda.Event | None = None
        if source.is_cuda:
            self._done = torch.cuda.current_stream(source.device).record_event()

    def wait(self) -> Tensor:
        """Makes the host wait for the copy; returns it."""
        if self._done is not None:
            self._done.synchronize()
        return self._copy

"""Asynchronous copies between a device and host memory."""

import torch
from torch import Tensor


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """Copies a small host tensor to `device`; the host does not wait."""
    if device.type == "cuda":
        # Page-locked: a copy from pageable memory waits for the device.
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


class CopyToHost:
    """An asynchronous copy to the host. Keeps the source alive until `wait()`."""

    def __init__(self, source: Tensor, destination: Tensor, done: torch.cuda.Event | None) -> None:
        self.source: Tensor | None = source
        self.destination = destination
        """The copy; read it only after `wait` has returned."""
        self._done = done

    def wait(self) -> Tensor:
        """Makes the host wait for the copy; returns it."""
        if self._done is not None:
            self._done.synchronize()
        self.source = None
        return self.destination


class HostCopies:
    """Copies in a separate CUDA stream, overlapping with other work; immediate on CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def zeros_on_host(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """Returns zeros [num_elements], page-locked for a GPU, so that copies can overlap."""
        return torch.zeros(num_elements, dtype=dtype, pin_memory=self._stream is not None)

    def to_device(self, on_host: Tensor) -> Tensor:
        """Copies a tensor from `zeros_on_host`, which the caller may release but not change.

        The copy does not wait for work queued before, and the host not for the copy.
        """
        if self._stream is None:
            return on_host.clone()
        with torch.cuda.stream(self._stream):
            tensor = on_host.to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._stream.record_event())
        # Allocated in another stream, which must not reuse the memory before this one is done.
        tensor.record_stream(current)
        return tensor

    def to_host(self, tensor: Tensor) -> CopyToHost:
        """Starts copying a tensor after the work queued so far; do not change it before the end."""
        if self._stream is None:
            return CopyToHost(tensor, tensor.clone(), None)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            on_host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            on_host.copy_(tensor, non_blocking=True)
        return CopyToHost(tensor, on_host, self._stream.record_event())

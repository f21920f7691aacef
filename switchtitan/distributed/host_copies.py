"""Copies between a device and host memory that neither of them waits for until they are needed."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CopyToDevice:
    """A copy on its way to the device."""

    _tensor: Tensor
    _done: torch.cuda.Event | None

    def wait(self) -> Tensor:
        """The copy, for use in the device's current stream, which waits for it; the host does not."""
        if self._done is not None:
            stream = torch.cuda.current_stream(self._tensor.device)
            stream.wait_event(self._done)
            # It was allocated in another stream, which must not reuse its memory before this one is done with it.
            self._tensor.record_stream(stream)
        return self._tensor


@dataclass(frozen=True)
class CopyToHost:
    """A copy on its way to the host."""

    destination: Tensor
    """Where it goes; not to be read before `wait` has returned."""
    _done: torch.cuda.Event | None

    def wait(self) -> Tensor:
        """The copy; the host waits until it is there."""
        if self._done is not None:
            self._done.synchronize()
        return self.destination


class HostCopies:
    """Copies in a stream of their own, beside a CUDA device's other work; on a CPU they are there at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def zeros_on_host(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """[num_elements], page-locked where the device is a GPU, which cannot copy beside other work otherwise."""
        return torch.zeros(num_elements, dtype=dtype, pin_memory=self._stream is not None)

    def to_device(self, on_host: Tensor) -> CopyToDevice:
        """Starts copying what `zeros_on_host` gave, which must not change any more, but need not be kept either: page-locked
        memory is not reused before what reads it is done."""
        if self._stream is None:
            return CopyToDevice(on_host.clone(), None)
        with torch.cuda.stream(self._stream):
            tensor = on_host.to(self._device, non_blocking=True)
        return CopyToDevice(tensor, self._stream.record_event())

    def back_to_device(self, copy: CopyToHost) -> CopyToDevice:
        """Starts copying what `to_host` copies once it is there, for which the host does not wait."""
        # Both copies are made in one stream, in order.
        return self.to_device(copy.destination)

    def to_host(self, tensor: Tensor) -> CopyToHost:
        """Starts copying a contiguous tensor as it is after all work that the device has been given; it must not change."""
        if self._stream is None:
            return CopyToHost(tensor.clone(), None)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            on_host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        return CopyToHost(on_host, self._stream.record_event())

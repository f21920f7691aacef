"""Copies between a device and host memory that neither of them waits for until they are needed."""

from dataclasses import dataclass

import torch
from torch import Tensor


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on `device`; the host waits for nothing."""
    if device.type == "cuda":
        # Page-locked, since a copy from other memory waits for the device.
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


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


class CopyToHost:
    """A copy on its way to the host. It keeps what it is a copy of until `wait` or `join`, one of which must be called."""

    def __init__(self, source: Tensor, destination: Tensor, done: torch.cuda.Event | None) -> None:
        self.source: Tensor | None = source
        self.destination = destination
        """Where it goes; not to be read before `wait` has returned."""
        self._done = done

    def wait(self) -> Tensor:
        """The copy; the host waits until it is there."""
        if self._done is not None:
            self._done.synchronize()
        self.source = None
        return self.destination

    def join(self) -> None:
        """Makes the device's current stream wait for it, but not the host; the source's memory is then that stream's again."""
        if self._done is not None and self.source is not None:
            torch.cuda.current_stream(self.source.device).wait_event(self._done)
        self.source = None


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
        """Starts copying what `to_host` copies, not before the work that the device's current stream has been given; the host
        waits for nothing. The result must be kept until `CopyToDevice.wait`."""
        if self._stream is None:
            return CopyToDevice(copy.destination.clone(), None)
        # In the current stream's memory, which else would be split in two for good.
        tensor = torch.empty_like(copy.destination, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            # Behind the copy to the host, which was made in the same stream.
            tensor.copy_(copy.destination, non_blocking=True)
        return CopyToDevice(tensor, self._stream.record_event())

    def to_host(self, tensor: Tensor) -> CopyToHost:
        """Starts copying a tensor as it is after all work that the device has been given; it must not change until then."""
        if self._stream is None:
            return CopyToHost(tensor, tensor.clone(), None)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            on_host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            on_host.copy_(tensor, non_blocking=True)
        return CopyToHost(tensor, on_host, self._stream.record_event())

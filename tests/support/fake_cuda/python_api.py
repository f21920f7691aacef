"""Functions of `torch.cuda` that training calls, for one device that does nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor


class PinnedMemory:
    """The page-locked host tensors: fake tensors do not have this flag."""

    def __init__(self) -> None:
        self._tensors: WeakSet[Tensor] = WeakSet()

    def add(self, tensor: Tensor) -> None:
        self._tensors.add(tensor)

    def __contains__(self, tensor: Tensor) -> bool:
        return any(tensor is pinned for pinned in self._tensors)


pinned_memory = PinnedMemory()
host_waits: list[str] = []
"""Calls for which the host waits for the device, since the last clear."""


class FakeEvent:
    """A `torch.cuda.Event`."""

    def __init__(self, *args: Any, **keys: Any) -> None:
        pass

    def record(self, stream: "FakeStream | None" = None) -> None:
        pass

    def wait(self, stream: "FakeStream | None" = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        host_waits.append("Event.synchronize")


class FakeStream:
    """A `torch.cuda.Stream`."""

    device = torch.device("cuda", 0)

    def __init__(self, *args: Any, **keys: Any) -> None:
        pass

    def wait_stream(self, stream: "FakeStream") -> None:
        pass

    def wait_event(self, event: FakeEvent) -> None:
        pass

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        return event or FakeEvent()

    def synchronize(self) -> None:
        host_waits.append("Stream.synchronize")


_current_streams = [FakeStream()]


@contextmanager
def _stream(stream: FakeStream) -> Iterator[None]:
    _current_streams.append(stream)
    try:
        yield
    finally:
        _current_streams.pop()


def _pin_memory(tensor: Tensor, device: object = None) -> Tensor:
    pinned = tensor.clone()
    pinned_memory.add(pinned)
    return pinned


def install() -> None:
    """Replaces the functions of `torch.cuda` for the rest of this process."""
    functions = {
        "Stream": FakeStream,
        "Event": FakeEvent,
        "stream": _stream,
        "current_stream": lambda device=None: _current_streams[-1],
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device_count": lambda: 1,
        "synchronize": lambda device=None: host_waits.append("synchronize"),
        "get_device_name": lambda device=None: "fake CUDA",
        "get_device_capability": lambda device=None: (9, 0),
        "_lazy_init": lambda: None,
    }
    for name, function in functions.items():
        setattr(torch.cuda, name, function)
    torch.Tensor.pin_memory = _pin_memory  # type: ignore[method-assign]
    torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign]

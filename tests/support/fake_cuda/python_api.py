"""Functions of `torch.cuda` that training calls, for one device that does nothing.

What has ended before what, on the host and on streams, is known by vector clocks (Fidge 1988,
"Timestamps in message-passing systems that preserve the partial ordering"). Every actor counts its
own operations, and knows up to which operation every other actor has come before its next one.
Whoever waits for an actor learns what that actor knows.
"""

import weakref
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensor


class Actor:
    """The host or a stream; its operations run in order.

    Attributes:
        clock: actor -> its last operation that has ended before the next operation of this one.
    """

    def __init__(self, name):
        self.name = name
        self.clock = {}

    def advance(self):
        """Counts an operation; returns its number, from 1."""
        self.clock[self] = self.clock.get(self, 0) + 1
        return self.clock[self]

    def wait_for(self, clock):
        """Starts the next operation after all that `clock` has seen."""
        for actor, number in clock.items():
            if number > self.clock.get(actor, 0):
                self.clock[actor] = number

    def has_seen(self, actor, number):
        """Whether this operation of `actor` has ended before the next operation of this one."""
        return self.clock.get(actor, 0) >= number


host = Actor("the host")


class PinnedMemory:
    """The page-locked host memory: fake tensors do not have this flag."""

    def __init__(self):
        self._storages = set()

    def add(self, tensor):
        storage = tensor.untyped_storage()
        self._storages.add(storage._cdata)
        weakref.finalize(storage, self._storages.discard, storage._cdata)

    def __contains__(self, tensor):
        return tensor.untyped_storage()._cdata in self._storages


pinned_memory = PinnedMemory()
host_waits = []
"""Calls for which the host waits for the device, since the last clear."""


class FakeEvent:
    """A `torch.cuda.Event`."""

    def __init__(self, *args, **keys):
        self._clock = {}

    def record(self, stream=None):
        self._clock = dict((stream or current_stream()).actor.clock)

    def wait(self, stream=None):
        (stream or current_stream()).actor.wait_for(self._clock)

    def query(self):
        # True: so the host knows that the event's work has ended.
        host.wait_for(self._clock)
        return True

    def synchronize(self):
        host_waits.append("Event.synchronize")
        host.wait_for(self._clock)

    def elapsed_time(self, end):
        """Milliseconds: always 1. As CUDA, refuses events that may not have ended."""
        for event in (self, end):
            if not all(host.has_seen(actor, number) for actor, number in event._clock.items()):
                raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return 1.0


class FakeStream:
    """A `torch.cuda.Stream`."""

    device = torch.device("cuda", 0)
    _num_streams = 0

    def __init__(self, *args, **keys):
        self.actor = Actor(f"stream {FakeStream._num_streams}")
        FakeStream._num_streams += 1

    def wait_stream(self, stream):
        self.actor.wait_for(stream.actor.clock)

    def wait_event(self, event):
        event.wait(self)

    def record_event(self, event=None):
        event = event or FakeEvent()
        event.record(self)
        return event

    def synchronize(self):
        host_waits.append("Stream.synchronize")
        host.wait_for(self.actor.clock)


_current_streams = [FakeStream()]


def forget_streams():
    """Starts with a new default stream, after which no work of others is known."""
    host.clock.clear()
    _current_streams[:] = [FakeStream()]


def current_stream(device=None):
    """`torch.cuda.current_stream`; stream 0 is the default."""
    return _current_streams[-1]


@contextmanager
def _stream(stream):
    _current_streams.append(stream)
    try:
        yield
    finally:
        _current_streams.pop()


recorded_streams = {}
"""Address of a storage -> the streams that `record_stream` has named for it."""


def _record_stream(tensor, stream):
    recorded_streams.setdefault(tensor.untyped_storage()._cdata, []).append(stream)


def _synchronize(device=None):
    host_waits.append("synchronize")


def _pin_memory(tensor, device=None):
    pinned = tensor.clone()
    pinned_memory.add(pinned)
    return pinned


_data_ptr = torch.Tensor.data_ptr


def _address(tensor):
    """`Tensor.data_ptr`; of a fake tensor, which has no memory, what tells storages apart."""
    return tensor.untyped_storage()._cdata if isinstance(tensor, FakeTensor) else _data_ptr(tensor)


def install():
    """Replaces the functions of `torch.cuda` for the rest of this process."""
    functions = {
        "Stream": FakeStream,
        "Event": FakeEvent,
        "stream": _stream,
        "current_stream": current_stream,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device_count": lambda: 1,
        "synchronize": _synchronize,
        "get_device_name": lambda device=None: "fake CUDA",
        "get_device_capability": lambda device=None: (9, 0),
        "_lazy_init": lambda: None,
    }
    for name, function in functions.items():
        setattr(torch.cuda, name, function)
    torch.Tensor.data_ptr = _address  # type: ignore[method-assign]
    torch.Tensor.pin_memory = _pin_memory  # type: ignore[method-assign]
    torch.Tensor.record_stream = _record_stream  # type: ignore[method-assign]

"""Block inputs that wait for the backward pass in host memory."""

import weakref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from switchtitan.distributed.host_copies import CopyToDevice, CopyToHost, HostCopies


class CallWithInputOnHost:
    """A `contracts.CallBlock` that keeps a block's first argument in host memory until the backward pass comes to that block.

    Copies go in a stream of their own, to and from page-locked memory, beside a CUDA device's other work, and the host waits
    for none: a copy back is queued behind the copy that it needs, and started one block before the backward pass comes there.
    What else a block saves stays where it is, its weights above all, which torch's own `save_on_cpu` would copy each time.
    """

    def __init__(self, copies: HostCopies) -> None:
        self._copies = copies
        # The graph owns them: those of a forward pass that no backward pass follows go with it.
        self._waiting: list[weakref.ref[_Input]] = []
        self._storage: torch.UntypedStorage | None = None

    def __call__(self, block: nn.Module, hidden: Tensor, *args: object) -> Tensor:
        """`block(hidden, *args)`; hidden must not be changed in place before the backward pass."""
        # Not in a closure: the graph keeps the hooks, and would keep the storage with them.
        self._storage = hidden.untyped_storage()
        try:
            with saved_tensors_hooks(self._offload, self._fetch):
                output: Tensor = block(hidden, *args)
        finally:
            self._storage = None
        return output

    def tensors_on_host(self) -> list[Tensor]:
        """What is kept now."""
        kept = (reference() for reference in self._waiting)
        return [entry.on_host.destination for entry in kept if entry is not None]

    def _offload(self, saved: Tensor) -> "Tensor | _Input":
        if saved.untyped_storage() is not self._storage:
            return saved
        entry = _Input(self._copies.to_host(saved.detach()))
        self._waiting.append(weakref.ref(entry))
        return entry

    def _fetch(self, packed: "Tensor | _Input") -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        on_device = self._start(packed)
        while self._waiting and self._waiting[-1]() in (packed, None):
            self._waiting.pop()
        if self._waiting and (needed_next := self._waiting[-1]()) is not None:
            self._start(needed_next)
        return on_device.wait()

    def _start(self, entry: "_Input") -> CopyToDevice:
        if entry.on_device is None:
            entry.on_device = self._copies.back_to_device(entry.on_host)
        return entry.on_device


class _Input:
    """A tensor in host memory, and its copy on the way back once that has been started."""

    def __init__(self, on_host: CopyToHost) -> None:
        self.on_host = on_host
        self.on_device: CopyToDevice | None = None

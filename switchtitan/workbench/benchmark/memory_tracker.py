"""Memory of a training step on this rank by kind, at the peak and the maximum of each."""

import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from switchtitan.contracts import Batch
from switchtitan.distributed.fsdp import host_buffers
from switchtitan.distributed.shards import local
from switchtitan.training.step import Stepper
from switchtitan.workbench.benchmark.counters import CountingMode, tensors_in

TRAINED, FROZEN, BUFFERS, OPTIMIZER, HOST = "trained", "frozen", "buffers", "optimizer", "host"
GRADIENTS, OTHER = "gradients", "other"
KINDS = {
    TRAINED: "local shards of parameters that train",
    FROZEN: "frozen parameters: local shards, or full ones if every rank keeps them",
    BUFFERS: "buffers of the model",
    OPTIMIZER: "the optimizer's state",
    GRADIENTS: "reduced gradients of the local shards",
    OTHER: "gathered weights, activations, unreduced gradients, and tensors of operations",
    HOST: "buffers in host memory; not in the sums",
}
"""Kind of memory -> its description."""
_BATCH = "batch"
"""Not counted: allocated outside the step, and small."""
STATE = (TRAINED, FROZEN, BUFFERS, OPTIMIZER, GRADIENTS)
"""Kinds that do not depend on the batch."""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes by kind; see `KINDS`."""

    at_peak: Mapping[str, int]
    """At the maximum of the sum over all kinds but host memory."""
    most: Mapping[str, int]
    """Maximum of each kind, perhaps at different times."""
    peak: int
    """Maximum number of bytes in use."""
    state: int
    """Sum of weights, buffers, optimizer state and sharded gradients."""


class TrackMemory(CountingMode):
    """A context that tracks the tensors of a step, real or fake, from allocation to release.

    Counts the bytes that tensors request. Does not count allocator overhead, kernel workspaces,
    buffers of communication libraries, batches and the program itself. Enter it between two steps,
    when the optimizer's state is allocated.
    """

    def __init__(self, stepper: Stepper) -> None:
        super().__init__()
        self._stepper = stepper
        self._held: dict[int, tuple[str, int]] = {}
        """Storage -> its kind and bytes."""
        self._now = dict.fromkeys((*KINDS, _BATCH), 0)
        self._most, self._at_peak = dict(self._now), dict(self._now)
        self._clean_up = ExitStack()

    @property
    def use(self) -> MemoryUse:
        """Memory use so far."""
        at_peak, most = ({kind: use[kind] for kind in KINDS} for use in (self._at_peak, self._most))
        return MemoryUse(at_peak, most, _on_device(at_peak), sum(most[kind] for kind in STATE))

    def __enter__(self) -> "TrackMemory":
        model, optimizer = self._stepper.model, self._stepper.optimizer
        for parameter in model.parameters():
            self._hold(parameter, TRAINED if parameter.requires_grad else FROZEN)
            if parameter.requires_grad:
                # FSDP calls it when the shard's gradient is set.
                hook = parameter.register_post_accumulate_grad_hook(
                    lambda parameter: self._hold(parameter.grad, GRADIENTS)
                )
                self._clean_up.callback(hook.remove)
        for buffer in host_buffers(model):
            self._hold(buffer, HOST)
        for buffer in model.buffers():
            self._hold(buffer, BUFFERS)
        for tensor in _tensors_within(optimizer):
            self._hold(tensor, OPTIMIZER)
        self._watch_resizes()
        batches = self._stepper.batches
        self._clean_up.callback(setattr, self._stepper, "batches", batches)
        self._stepper.batches = self._without_batches(batches)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._clean_up.close()

    def count(self, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        for tensor in tensors_in(result):
            self._hold(tensor, OTHER)
        self._measure()

    def _hold(self, tensor: Tensor, kind: str) -> None:
        """Counts a tensor's storage as `kind`, unless it has a kind other than `OTHER`."""
        if is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor):
            # Its own storage has no memory.
            for name in tensor.__tensor_flatten__()[0]:
                self._hold(getattr(tensor, name), kind)
            return
        self._hold_storage(local(tensor).untyped_storage(), kind)

    def _hold_storage(self, storage: torch.UntypedStorage, kind: str) -> None:
        key = id(storage)
        if key not in self._held:
            weakref.finalize(storage, self._release, key)
        held_as, num_bytes = self._held.get(key, (kind, 0))
        self._now[held_as] -= num_bytes
        if held_as != OTHER:
            kind = held_as
        self._held[key] = kind, 0 if kind == _BATCH else storage.nbytes()
        self._now[kind] += self._held[key][1]

    def _release(self, key: int) -> None:
        kind, num_bytes = self._held.pop(key)
        self._now[kind] -= num_bytes

    def _measure(self) -> None:
        self._most = {kind: max(most, self._now[kind]) for kind, most in self._most.items()}
        if _on_device(self._now) > _on_device(self._at_peak):
            self._at_peak = dict(self._now)

    def _watch_resizes(self) -> None:
        """Follows storages that are resized: FSDP frees and allocates gathered weights by that."""
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._hold_storage(storage, OTHER)
            self._measure()
            return result

        self._clean_up.callback(setattr, torch.UntypedStorage, "resize_", resize)
        torch.UntypedStorage.resize_ = resize_and_count  # type: ignore[method-assign, assignment]

    def _without_batches(self, steps: Iterable[list[Batch]]) -> Generator[list[Batch], None, None]:
        for batches in steps:
            for tensor in tensors_in(batches):
                self._hold(tensor, _BATCH)
            yield batches


def _on_device(use: Mapping[str, int]) -> int:
    return sum(num_bytes for kind, num_bytes in use.items() if kind != HOST)


def _tensors_within(part: object) -> Iterator[Tensor]:
    """Yields the tensors in an object of this package or a torch optimizer, without modules.

    Searches nested objects. `state_dict` may read values and create new tensors, so it is not used.
    """
    if isinstance(part, Tensor):
        yield part
        return
    children: Iterable[object] = ()
    if isinstance(part, Mapping):
        children = part.values()
    elif isinstance(part, list | tuple | set):
        children = part
    elif isinstance(part, torch.optim.Optimizer) or (
        type(part).__module__.startswith("switchtitan.") and not isinstance(part, nn.Module)
    ):
        children = vars(part).values()
    for child in children:
        yield from _tensors_within(child)

"""Memory of a training step on this rank by kind, at the peak and the maximum of each."""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

import switchtitan
from switchtitan.contracts import SummedLoss
from switchtitan.distributed.fsdp import host_buffers
from switchtitan.distributed.shards import local
from switchtitan.observability.collectives import CountingMode
from switchtitan.training.step import Stepper

TRAINED, FROZEN, BUFFERS, OPTIMIZER, HOST = "trained", "frozen", "buffers", "optimizer", "host"
GRADIENTS, UNREDUCED_GRADIENTS = "gradients", "unreduced gradients"
GATHERED, ACTIVATIONS, TEMPORARY = "gathered", "activations", "temporary"
KINDS = {
    TRAINED: "local shards of parameters that train",
    FROZEN: "frozen parameters: local shards, or full ones if every rank keeps them",
    BUFFERS: "buffers of the model",
    OPTIMIZER: "the optimizer's state",
    GRADIENTS: "reduced gradients of the local shards",
    UNREDUCED_GRADIENTS: "full gradients before reduction; of all weights if there are several "
    "micro-batches",
    GATHERED: "full weights in the compute dtype",
    ACTIVATIONS: "tensors that a forward pass saves for the backward pass",
    TEMPORARY: "other tensors of operations and collectives, except in forward passes before the "
    "loss",
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

    @property
    def peak(self) -> int:
        """Maximum number of bytes in use."""
        return _on_device(self.at_peak)

    @property
    def state(self) -> int:
        """Sum of weights, buffers, optimizer state and sharded gradients."""
        return sum(self.most[kind] for kind in STATE)


class TrackMemory(CountingMode):
    """A context that tracks the tensors of a step, real or fake, from allocation to release.

    Counts the bytes that tensors request. Does not count allocator overhead, kernel workspaces,
    buffers of communication libraries, batches and the program itself. Enter it between two steps,
    when the optimizer's state is allocated.
    """

    def __init__(self, stepper: Stepper) -> None:
        super().__init__()
        self._stepper = stepper
        self._held: dict[int, _Held] = {}
        self._with_hook: set[int] = set()
        self._now = dict.fromkeys((*KINDS, _BATCH), 0)
        self._is_before_first_batch = self._is_forward = True
        self._most, self._at_peak = dict(self._now), dict(self._now)
        self._clean_up = ExitStack()

    @property
    def use(self) -> MemoryUse:
        """Memory use so far."""
        at_peak, most = ({kind: use[kind] for kind in KINDS} for use in (self._at_peak, self._most))
        return MemoryUse(at_peak, most)

    def __enter__(self) -> "TrackMemory":
        model, optimizer = self._stepper.model, self._stepper.optimizer
        for parameter in model.parameters():
            self._hold(parameter, TRAINED if parameter.requires_grad else FROZEN)
            if parameter.requires_grad:
                # FSDP calls it when the shard's gradient is set.
                self._remove_at_exit(
                    parameter.register_post_accumulate_grad_hook(
                        partial(self._hold_grad, GRADIENTS)
                    )
                )
        for buffer in host_buffers(model).values():
            self._hold(buffer, HOST)
        for buffer in model.buffers():
            self._hold(buffer, BUFFERS)
        for tensor in _tensors_within(optimizer):
            self._hold(tensor, OPTIMIZER)
        self._watch_resizes()
        # Called before the module's own hooks, but after those of its block, which gather.
        self._remove_at_exit(register_module_forward_pre_hook(self._before_module))
        # A module that is gathered alone is gathered by its own hooks, and freed after this one.
        self._remove_at_exit(
            register_module_forward_hook(lambda module, *_: self._hold_gathered(module))
        )
        loss = self._stepper.loss
        self._clean_up.callback(setattr, self._stepper, "loss", loss)
        self._stepper.loss = partial(self._loss, loss)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._clean_up.close()

    def count(self, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._hold(tensor, TEMPORARY)
        self._measure()

    def _hold(self, tensor: Tensor, kind: str) -> None:
        """Counts a tensor's storage as `kind`, unless it already has another kind."""
        if is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor):
            # Its own storage has no memory.
            for name in tensor.__tensor_flatten__()[0]:
                self._hold(getattr(tensor, name), kind)
            return
        storage = local(tensor).untyped_storage()
        key = id(storage)
        held = self._held.get(key)
        if held is None:
            num_bytes = 0 if kind == _BATCH else storage.nbytes()
            held = _Held(weakref.ref(storage, partial(self._release, key)), kind, num_bytes)
            self._held[key] = held
            self._now[kind] += held.num_bytes
        elif held.kind == TEMPORARY:
            self._move(held, kind)

    def _hold_grad(self, kind: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._hold(parameter.grad, kind)

    def _move(self, held: "_Held", kind: str) -> None:
        self._now[held.kind] -= held.num_bytes
        held.kind = kind
        if kind == _BATCH:
            held.num_bytes = 0
        self._now[kind] += held.num_bytes

    def _move_rest(self, kind: str) -> None:
        """Changes all temporary storages to this kind."""
        for held in list(self._held.values()):
            if held.kind == TEMPORARY:
                self._move(held, kind)
        self._measure()

    def _release(self, key: int, reference: object) -> None:
        held = self._held.pop(key)
        self._now[held.kind] -= held.num_bytes
        held.num_bytes = 0

    def _measure(self) -> None:
        now, most = self._now, self._most
        for kind, num_bytes in now.items():
            # Before the loss it is unknown what a forward pass saves.
            if num_bytes > most[kind] and not (kind == TEMPORARY and self._is_forward):
                most[kind] = num_bytes
        if _on_device(now) > _on_device(self._at_peak):
            self._at_peak = dict(now)

    def _watch_resizes(self) -> None:
        """Follows storages that are resized: FSDP frees and allocates gathered weights by that."""
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            held = self._held.get(id(storage))
            if held is not None and held.kind != _BATCH:
                self._now[held.kind] += storage.nbytes() - held.num_bytes
                held.num_bytes = storage.nbytes()
                self._measure()
            return result

        self._clean_up.callback(setattr, torch.UntypedStorage, "resize_", resize)
        torch.UntypedStorage.resize_ = resize_and_count  # type: ignore[method-assign, assignment]

    def _before_module(self, module: nn.Module, args: tuple) -> None:
        if module is self._stepper.model:
            # Only gradients outlive a micro-batch.
            self._move_rest(_BATCH if self._is_before_first_batch else UNREDUCED_GRADIENTS)
            self._is_before_first_batch, self._is_forward = False, True
            self._ignore_batch(*(arg for arg in args if isinstance(arg, Tensor)))
        self._hold_gathered(module)

    def _hold_gathered(self, module: nn.Module) -> None:
        """Counts parameters within the module that are gathered; some layers have no hooks, since a
        pair is called by another method."""
        for parameter in module.parameters():
            if isinstance(parameter, DTensor):
                continue
            self._hold(parameter, GATHERED)
            # FSDP reuses the full parameters and only resizes them.
            if parameter.requires_grad and id(parameter) not in self._with_hook:
                self._with_hook.add(id(parameter))
                self._remove_at_exit(
                    parameter.register_post_accumulate_grad_hook(
                        partial(self._hold_grad, UNREDUCED_GRADIENTS)
                    )
                )

    def _loss(
        self,
        summed_loss: SummedLoss,
        hidden: Tensor,
        head: nn.Module,
        targets: Tensor,
        divisor: int,
    ) -> Tensor:
        self._ignore_batch(targets)
        # Gathered with the last norm.
        self._hold_gathered(head)
        # Tensors that blocks do not save are freed; the peak may be in the loss.
        self._end_forward()
        loss = summed_loss(hidden, head, targets, divisor)
        # By then the tensors that the loss does not save are freed too.
        loss.register_hook(lambda grad: self._end_forward())
        return loss

    def _end_forward(self) -> None:
        self._is_forward = False
        self._move_rest(ACTIVATIONS)

    def _ignore_batch(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self._hold(tensor, _BATCH)

    def _remove_at_exit(self, handle: Any) -> None:
        self._clean_up.callback(handle.remove)


def _on_device(use: Mapping[str, int]) -> int:
    return sum(num_bytes for kind, num_bytes in use.items() if kind != HOST)


@dataclass
class _Held:
    """A storage in memory."""

    storage: "weakref.ref[torch.UntypedStorage]"
    kind: str
    num_bytes: int


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
    elif isinstance(part, torch.optim.Optimizer):
        children = (part.state, part.param_groups)
    elif type(part).__module__.startswith(f"{switchtitan.__name__}.") and not isinstance(
        part, nn.Module
    ):
        children = vars(part).values()
    for child in children:
        yield from _tensors_within(child)

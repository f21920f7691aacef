"""What a training step's memory holds on this rank, at its peak and at any time."""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

import switchtitan
from switchtitan.contracts import SummedLoss
from switchtitan.distributed.blocks import CallWithInputOnHost
from switchtitan.distributed.count_collectives import CountingMode
from switchtitan.distributed.fsdp import host_buffers
from switchtitan.distributed.shards import local
from switchtitan.training.stepper import Stepper

TRAINED, FROZEN, BUFFERS, OPTIMIZER, HOST = "trained", "frozen", "buffers", "optimizer", "host"
GRADIENTS, UNREDUCED_GRADIENTS = "gradients", "unreduced gradients"
GATHERED, ACTIVATIONS, TEMPORARY = "gathered", "activations", "temporary"
KINDS = {
    TRAINED: "local shards of parameters that train",
    FROZEN: "frozen parameters: local shards, or full ones if every rank keeps them",
    BUFFERS: "buffers of the model: tensors that are no parameters",
    OPTIMIZER: "the optimizer's state",
    GRADIENTS: "reduced gradients of the local shards",
    UNREDUCED_GRADIENTS: "full gradients before they are reduced; with several micro-batches of all weights",
    GATHERED: "full weights in the compute dtype",
    ACTIVATIONS: "what a forward pass leaves behind for its backward pass",
    TEMPORARY: "the rest: what operations and collectives need for a while, but not in forward "
    "passes "
    "up to the loss",
    HOST: "what waits in host memory: buffers, block inputs; in no sum",
}
"""What memory may hold -> what that is."""
_BATCH = "batch"
"""What is not counted: it lies elsewhere before it is used, and is small."""
STATE = (TRAINED, FROZEN, BUFFERS, OPTIMIZER, GRADIENTS)
"""What there is of a model and its optimizer whatever the batch is."""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes by kind; see `KINDS`."""

    at_peak: Mapping[str, int]
    """When the sum over all kinds but those in host memory was largest."""
    most: Mapping[str, int]
    """The most of each kind at any time; they need not have come together."""

    @property
    def peak(self) -> int:
        """The most bytes in use at a time."""
        return _on_device(self.at_peak)

    @property
    def state(self) -> int:
        """Weights, buffers, the optimizer's state and the gradients of shards, together."""
        return sum(self.most[kind] for kind in STATE)


class TrackMemory(CountingMode):
    """A context that follows the tensors of a step, with or without values, from allocation to
    release.

    Counted are the bytes that tensors ask for. What allocators round up or hold back is not, nor
    are workspaces of kernels, buffers of communication libraries, batches, and this program itself.
    Begin between two steps, with the optimizer's state in place.
    """

    def __init__(self, stepper: Stepper) -> None:
        super().__init__()
        self._stepper = stepper
        self._held: dict[int, _Held] = {}
        self._gathered: list[_Held] = []
        self._with_hook: set[int] = set()
        self._now = dict.fromkeys((*KINDS, _BATCH), 0)
        self._is_before_first_batch = self._is_forward = True
        self._most, self._at_peak = dict(self._now), dict(self._now)
        self._clean_up = ExitStack()

    @property
    def use(self) -> MemoryUse:
        """Of all that has happened inside so far."""
        at_peak, most = ({kind: use[kind] for kind in KINDS} for use in (self._at_peak, self._most))
        return MemoryUse(at_peak, most)

    def __enter__(self) -> "TrackMemory":
        model, optimizer = self._stepper.model, self._stepper.optimizer
        for parameter in model.parameters():
            self._hold(parameter, TRAINED if parameter.requires_grad else FROZEN)
            if parameter.requires_grad:
                # FSDP calls it once the shard's gradient is there.
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
        # Called before a module's own hooks, but after those of the block around it, which gather.
        self._remove_at_exit(register_module_forward_pre_hook(self._before_module))
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
        """Counts a tensor's storage as `kind`, unless it has been found to be another kind
        before."""
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
        else:
            return
        if kind == GATHERED:
            self._gathered.append(held)

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
        """Finds all that is temporary to be of this kind."""
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
        # FSDP frees and allocates these by resizing their storage, which is no operation.
        for held in self._gathered:
            storage = held.storage()
            if storage is not None and (num_bytes := storage.nbytes()) != held.num_bytes:
                now[GATHERED] += num_bytes - held.num_bytes
                held.num_bytes = num_bytes
        for kind, num_bytes in now.items():
            # Until the loss it is not known what a forward pass will keep.
            if num_bytes > most[kind] and not (kind == TEMPORARY and self._is_forward):
                most[kind] = num_bytes
        if _on_device(now) > _on_device(self._at_peak):
            self._at_peak = dict(now)

    def _before_module(self, module: nn.Module, args: tuple) -> None:
        self._hold_on_host()
        if module is self._stepper.model:
            # Nothing but gradients outlasts a micro-batch.
            self._move_rest(_BATCH if self._is_before_first_batch else UNREDUCED_GRADIENTS)
            self._is_before_first_batch, self._is_forward = False, True
            self._ignore_batch(*(arg for arg in args if isinstance(arg, Tensor)))
        self._hold_gathered(module)

    def _hold_gathered(self, module: nn.Module) -> None:
        """Counts the module's own parameters, if they are gathered now."""
        for parameter in module.parameters(recurse=False):
            if isinstance(parameter, DTensor):
                continue
            self._hold(parameter, GATHERED)
            # FSDP keeps the same full parameters and only resizes them.
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
        # What the blocks do not keep is gone; the loss itself may be what takes most.
        self._end_forward()
        # It may be used without being called.
        self._hold_gathered(head)
        loss = summed_loss(hidden, head, targets, divisor)
        # By then what the loss does not keep is gone too.
        loss.register_hook(lambda grad: self._end_forward())
        return loss

    def _hold_on_host(self) -> None:
        """Counts block inputs that wait in host memory as that."""
        call_block = self._stepper.model.call_block
        if isinstance(call_block, CallWithInputOnHost):
            for tensor in call_block.tensors_on_host():
                self._hold(tensor, HOST)

    def _end_forward(self) -> None:
        self._hold_on_host()
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
    """A storage that is in memory."""

    storage: "weakref.ref[torch.UntypedStorage]"
    kind: str
    num_bytes: int


def _tensors_within(part: object) -> Iterator[Tensor]:
    """The tensors that an object of ours, or an optimizer of torch's, holds, also in objects that
    it holds, but for modules.

    `state_dict` will not do: it may look at values, and some of what it gives is made for it.
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

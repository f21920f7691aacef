"""Compilation, recomputation and activation offload, applied to each block of a model."""

import weakref

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from switchtitan.contracts import LanguageModel
from switchtitan.distributed.config import ActivationCheckpointConfig
from switchtitan.distributed.host_copies import CopyToDevice, CopyToHost, HostCopies


def compile_blocks(model: LanguageModel) -> None:
    """Compiles every block in place, as one graph with static shapes.

    Equal blocks share the graph, so compile time does not grow with depth. Call after activation
    checkpointing and before sharding.
    """
    for block in model.blocks().values():
        block.compile(fullgraph=True, dynamic=False)


_EXPENSIVE_OPERATIONS = {
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "flex_attention",
    # Of the package flash-attn 2 (flash_attn/flash_attn_interface.py).
    "flash_attn::_flash_attn_forward",
}
"""By name: the package may be missing, or imported later."""


def checkpoint_activations(
    model: LanguageModel, config: ActivationCheckpointConfig, preserve_rng_state: bool = True
) -> None:
    """Makes each block keep fewer activations.

    Replaces the block's forward method, not the module, so parameter names do not change. Call
    before compilation and sharding.

    Args:
        preserve_rng_state: whether to recompute with the random numbers of the forward pass. Takes
            host time in every block; without effect in compiled blocks, which always do.
    """
    if config.mode == "none":
        return
    options: dict[str, object] = {"preserve_rng_state": preserve_rng_state}
    if config.mode == "selective":
        options["context_fn"] = _selective_contexts
    for block in model.blocks().values():
        _checkpoint_block(block, options)


def _checkpoint_block(block: nn.Module, options: dict) -> None:
    forward = block.forward

    # A frame of our own: torch.compile starts no graph in a frame inside torch.
    def checkpointed_forward(*args: object) -> Tensor:
        return checkpoint(forward, *args, use_reentrant=False, **options)

    block.forward = checkpointed_forward


def _selective_contexts() -> tuple:
    return create_selective_checkpoint_contexts(_keep_matrix_products)


def _keep_matrix_products(
    ctx: object, operation: OpOverload | HigherOrderOperator, *args: object, **kwargs: object
) -> CheckpointPolicy:
    name = operation.name()
    keep = name in _EXPENSIVE_OPERATIONS and not _builds_a_weight(name, args)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _builds_a_weight(operation: str, args: tuple[object, ...]) -> bool:
    """Whether a product is added to a matrix, which merges weights, and not to a bias."""
    return operation == "aten::addmm" and isinstance(args[0], Tensor) and args[0].dim() == 2


class CallWithInputOnHost:
    """A `contracts.CallBlock` that keeps a block's first argument in host memory until backward.

    Copies use a separate stream and page-locked memory, and the host never waits for them. An
    eager block's input is copied out while the block runs. A compiled block saves its input at its
    end, so the copy overlaps the next block. The device memory is free when the next copy out
    starts. An input is copied back during the backward pass of the block after it; the last block's
    input is still on the device then. Other saved tensors stay on the device, in particular the
    weights, which torch's `save_on_cpu` would copy each time.
    """

    def __init__(self, copies: HostCopies) -> None:
        self._copies = copies
        # The graph owns the inputs: without a backward pass they are freed with the graph.
        self._waiting: list[weakref.ref[_Input]] = []
        self._storage: torch.UntypedStorage | None = None
        self._leaving: CopyToHost | None = None
        self._coming: CopyToDevice | None = None

    def __call__(self, block: nn.Module, hidden: Tensor, *args: object) -> Tensor:
        """Returns `block(hidden, *args)`; do not change `hidden` before the backward pass."""
        # Not in a closure: the graph keeps the hooks alive, and with them the storage.
        self._storage = hidden.untyped_storage()
        try:
            with saved_tensors_hooks(self._offload, self._fetch):
                output: Tensor = block(hidden, *args)
        finally:
            self._storage = None
        return output

    def tensors_on_host(self) -> list[Tensor]:
        """Returns the inputs that the backward pass has not used yet."""
        kept = (reference() for reference in self._waiting)
        return [entry.on_host.destination for entry in kept if entry is not None]

    def _offload(self, saved: Tensor) -> "Tensor | _Input":
        if saved.untyped_storage() is not self._storage:
            # No reference cycle: a checkpointed block saves its arguments, never a result.
            return saved
        if self._leaving is not None:
            self._leaving.join()
        entry = _Input(self._copies.to_host(saved.detach()))
        self._leaving = entry.on_host
        self._waiting.append(weakref.ref(entry))
        return entry

    def _fetch(self, packed: "Tensor | _Input") -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        tensor = packed.on_host.source
        if tensor is not None:
            packed.on_host.join()
        else:
            tensor = self._start(packed).wait()
        while self._waiting and self._waiting[-1]() in (packed, None):
            self._waiting.pop()
        if self._coming is not None:
            # It may belong to another graph, already freed: its memory must outlive the copy.
            self._coming.wait()
        needed_next = self._waiting[-1]() if self._waiting else None
        self._coming = None if needed_next is None else self._start(needed_next)
        return tensor

    def _start(self, entry: "_Input") -> CopyToDevice:
        if entry.on_device is None:
            entry.on_device = self._copies.back_to_device(entry.on_host)
        return entry.on_device


class _Input:
    """A tensor in host memory, and its copy back to the device once that has started."""

    def __init__(self, on_host: CopyToHost) -> None:
        self.on_host = on_host
        self.on_device: CopyToDevice | None = None

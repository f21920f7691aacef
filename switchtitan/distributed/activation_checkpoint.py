"""Activation checkpointing of a model's blocks, from outside."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from switchtitan.contracts import LanguageModel
from switchtitan.distributed.config import ActivationCheckpointConfig

_aten = torch.ops.aten
_EXPENSIVE_OPERATIONS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}


def checkpoint_activations(model: LanguageModel, config: ActivationCheckpointConfig) -> None:
    """Makes each block keep fewer activations. The forward method is replaced, not the module: names stay as they are.

    Call before compilation and sharding.
    """
    if config.mode == "none":
        return
    contexts = {} if config.mode == "full" else {"context_fn": _selective_contexts}
    for block in model.blocks().values():
        _checkpoint_block(block, contexts)


def _checkpoint_block(block: nn.Module, contexts: dict) -> None:
    forward = block.forward

    # A frame of ours, since the compiler starts no graph in a frame of torch's own.
    def checkpointed_forward(*args: object) -> Tensor:
        return checkpoint(forward, *args, use_reentrant=False, **contexts)

    block.forward = checkpointed_forward


def _selective_contexts() -> tuple:
    return create_selective_checkpoint_contexts(_keep_matrix_products)


def _keep_matrix_products(
    ctx: object, operation: object, *args: object, **kwargs: object
) -> CheckpointPolicy:
    keep = operation in _EXPENSIVE_OPERATIONS and not _builds_a_weight(operation, args)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _builds_a_weight(operation: object, args: tuple[object, ...]) -> bool:
    """Whether a product is added to a whole matrix: that merges weights, while a linear layer adds its bias, a vector."""
    return operation is _aten.addmm.default and isinstance(args[0], Tensor) and args[0].dim() == 2

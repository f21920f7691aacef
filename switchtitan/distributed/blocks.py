"""Compilation and recomputation, applied to each block of a model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from switchtitan.contracts import LanguageModel
from switchtitan.distributed.config import ActivationCheckpointConfig

_MOST_SHAPES = 64
"""Graphs of one function. Beyond torch's limit of 8, a step would end with an error: a model may
have 9 widths, or 5 with layers that do not fill groups."""


def compile_blocks(model: LanguageModel) -> None:
    """Compiles every block in place, as one graph with static shapes that equal blocks share.

    Call after activation checkpointing and before sharding.
    """
    for block in model.blocks().values():
        block.compile(fullgraph=True, dynamic=False)


def compile_if(is_compiled: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns what compiles a function to one graph for each shape, or returns it as it is."""
    if is_compiled:
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, _MOST_SHAPES)
        return partial(torch.compile, fullgraph=True, dynamic=False)
    return lambda function: function


_EXPENSIVE_OPERATIONS = {
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "flex_attention",
    # Of the package flash-attn 2, which may be missing.
    "flash_attn::_flash_attn_forward",
}


def checkpoint_activations(model: LanguageModel, config: ActivationCheckpointConfig) -> None:
    """Makes each block keep fewer activations. Call before compilation and sharding.

    What is recomputed draws the random numbers of the forward pass.
    """
    if config.mode == "none":
        return
    options = dict[str, object]()
    if config.mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_matrix_products)
    for block in model.blocks().values():
        _checkpoint_block(block, options)


def _checkpoint_block(block: nn.Module, options: dict) -> None:
    forward = block.forward

    # A frame of our own: torch.compile starts no graph in a frame inside torch.
    def checkpointed_forward(*args: object) -> Tensor:
        return checkpoint(forward, *args, use_reentrant=False, **options)

    block.forward = checkpointed_forward


def _keep_matrix_products(
    ctx: object, operation: OpOverload | HigherOrderOperator, *args: object, **kwargs: object
) -> CheckpointPolicy:
    name, to = operation.name(), args[0]
    # A product that is added to a matrix, and not to a bias, merges weights.
    merges = name == "aten::addmm" and isinstance(to, Tensor) and to.dim() == 2
    keep = name in _EXPENSIVE_OPERATIONS and not merges
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

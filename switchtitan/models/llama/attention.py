"""Attention backends by name, and their requirements.

| name       | attends to                                | requires                           |
|------------|-------------------------------------------|------------------------------------|
| sdpa       | all earlier tokens of the packed sequence | nothing                            |
| flex       | earlier tokens of the same document       | CUDA; on a CPU forward only        |
| flash_attn | all earlier tokens of the packed sequence | CUDA, bfloat16, package flash-attn |
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from switchtitan.errors import EnvironmentMismatchError

Attend = Callable[[Tensor, Tensor, Tensor, BlockMask | None], Tensor]
"""(query, key, value, mask) -> attended, of the query's shape; the mask is `build_mask`'s.

query: [batch, heads, seq, head_dim]; key and value: [batch, kv_heads, seq, head_dim].
"""

_HOW_TO_INSTALL_FLASH = (
    "the package flash-attn is not installed; run `pip install flash-attn --no-build-isolation`"
)


def load_attention(name: str) -> Attend:
    """Imports a backend.

    Raises:
        EnvironmentMismatchError: if it is not installed.
    """
    return {"sdpa": lambda: _attend_sdpa, "flex": _load_flex, "flash_attn": _load_flash}[name]()


def _attend_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask | None) -> Tensor:
    is_grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=is_grouped)


def _load_flex() -> Attend:
    # Eager, it keeps all seq * seq scores in memory. A compiled block traces through it. Compiled
    # here, not at import, so that processes with another backend do not load the compiler.
    compiled_flex_attention = torch.compile(flex_attention)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask | None) -> Tensor:
        is_grouped = query.shape[1] != key.shape[1]
        attended: Tensor = compiled_flex_attention(
            query, key, value, block_mask=mask, enable_gqa=is_grouped
        )
        return attended

    return attend


def _load_flash() -> Attend:
    try:
        flash_attn_func = importlib.import_module("flash_attn").flash_attn_func
    except ImportError as error:
        raise EnvironmentMismatchError(
            f"[model] attention = 'flash_attn': {_HOW_TO_INSTALL_FLASH}, or set attention = 'sdpa'"
        ) from error

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask | None) -> Tensor:
        by_position = [part.transpose(1, 2) for part in (query, key, value)]
        attended: Tensor = flash_attn_func(
            *by_position,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return attended.transpose(1, 2)

    return attend


def build_mask(name: str, document_ids: Tensor) -> BlockMask | None:
    """Returns a backend's mask, once per forward pass: causal within documents for flex.

    Args:
        document_ids: [batch, seq].
    """
    if name != "flex":
        return None

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[batch, query] == document_ids[batch, key])

    batch_size, seq_len = document_ids.shape
    return _compiled_create_block_mask()(
        sees, batch_size, None, seq_len, seq_len, device=document_ids.device
    )


@functools.cache
def _compiled_create_block_mask() -> Callable[..., BlockMask]:
    # Eager, it keeps all seq * seq scores in memory.
    return torch.compile(create_block_mask)


def check_attention(name: str, head_dim: int, device_type: str, compute_dtype: torch.dtype) -> None:
    """Checks that the backend `name` can train on this machine.

    Raises:
        EnvironmentMismatchError: if it cannot.
    """
    problem = None
    if name == "flex" and device_type == "cpu":
        problem = "torch has no backward of flex attention on a CPU; train on a GPU"
    elif name == "flex" and head_dim < 16:
        problem = (
            f"requires heads of at least 16 features on a GPU, got {head_dim}; lower num_heads"
        )
    elif name == "flash_attn":
        problem = _find_flash_problem(head_dim, device_type, compute_dtype)
    if problem is not None:
        raise EnvironmentMismatchError(
            f'[model] attention = {name!r}: {problem}, or set attention = "sdpa"'
        )


def _find_flash_problem(head_dim: int, device_type: str, compute_dtype: torch.dtype) -> str | None:
    if device_type != "cuda":
        return f"requires a CUDA GPU, got {device_type!r}; train on one"
    if importlib.util.find_spec("flash_attn") is None:
        return _HOW_TO_INSTALL_FLASH
    if compute_dtype not in (torch.bfloat16, torch.float16):
        return f"requires bfloat16 or float16, got {compute_dtype}; compute in bfloat16"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        name = torch.cuda.get_device_name()
        return f"requires an Ampere GPU or a newer one, got {name}; train on one"
    if head_dim > 256:
        return f"requires heads of at most 256 features, got {head_dim}; increase num_heads"
    return None

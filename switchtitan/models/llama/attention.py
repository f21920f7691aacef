"""Attention backends by name, and keys and values that are kept between calls."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from switchtitan.errors import EnvironmentMismatchError

Attend = Callable[[Tensor, Tensor, Tensor, BlockMask | None], Tensor]
"""(query, key, value, mask) -> attended, of the query's shape; the mask is `build_mask`'s.

query: [batch, heads, seq, head_dim]; key and value: [batch, kv_heads, seq, head_dim].
"""


def load_attention(name: str) -> Attend:
    """Returns a backend; raises an EnvironmentMismatchError if it is not installed."""
    if name == "flash_attn":
        return _load_flash()
    return {"sdpa": _attend_sdpa, "flex": _attend_flex}[name]


def _attend_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask | None) -> Tensor:
    is_grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=is_grouped)


def _attend_flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask | None) -> Tensor:
    is_grouped = query.shape[1] != key.shape[1]
    flex = _compiled(flex_attention)
    if torch.compiler.is_compiling():  # a block, which traces through the function itself
        flex = flex_attention
    attended: Tensor = flex(query, key, value, block_mask=mask, enable_gqa=is_grouped)
    return attended


def _load_flash() -> Attend:
    try:
        flash_attn_func = importlib.import_module("flash_attn").flash_attn_func
    except ImportError as error:
        raise EnvironmentMismatchError(
            "[model] attention = 'flash_attn': the package flash-attn is not installed; run "
            "`pip install flash-attn --no-build-isolation`, or set attention = 'sdpa'"
        ) from error

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask | None) -> Tensor:
        attended: Tensor = flash_attn_func(
            *(part.transpose(1, 2) for part in (query, key, value)),
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return attended.transpose(1, 2)

    return attend


def build_mask(name: str, document_ids: Tensor) -> BlockMask | None:
    """Returns a backend's mask, once per forward pass: for flex, causal within documents, whose ids
    are [batch, seq]."""
    if name != "flex":
        return None

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[batch, query] == document_ids[batch, key])

    batch_size, seq_len = document_ids.shape
    mask: BlockMask = _compiled(create_block_mask)(
        sees, batch_size, None, seq_len, seq_len, device=document_ids.device
    )
    return mask


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles, on first use, a function that in eager mode keeps all seq * seq scores."""
    return torch.compile(function)


def check_attention(name: str, device_type: str, compute_dtype: torch.dtype) -> None:
    """Raises an EnvironmentMismatchError if the backend `name` cannot train on this machine."""
    problem = None
    if name == "flex" and device_type == "cpu":
        problem = "torch has no backward of flex attention on a CPU; train on a GPU"
    elif name == "flash_attn" and device_type != "cuda":
        problem = f"requires a CUDA GPU, got {device_type!r}; train on one"
    elif name == "flash_attn" and compute_dtype not in (torch.bfloat16, torch.float16):
        problem = f"requires bfloat16 or float16, got {compute_dtype}; compute in bfloat16"
    if problem is not None:
        raise EnvironmentMismatchError(
            f"[model] attention = {name!r}: {problem}, or set attention = 'sdpa'"
        )
    load_attention(name)


@dataclass(eq=False)
class KeyValueCache:
    """What `Llama.forward` keeps of one sequence. Not for training."""

    cos: Tensor
    """[capacity, 1, head_dim/2] fp32, the rotary table of the longest sequence. `sin` is alike."""
    sin: Tensor

    def __post_init__(self) -> None:
        self._length = 0
        """Tokens read, with those of this forward pass."""
        self._stored: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        """Keys and values [1, kv_heads, capacity, head_dim] of each layer, in the dtype of its
        activations."""

    def next(self, seq_len: int) -> tuple[Tensor, Tensor]:
        """Returns cos and sin [seq, 1, head_dim/2] fp32 of the next `seq_len` tokens."""
        first, self._length = self._length, self._length + seq_len
        return self.cos[first : self._length], self.sin[first : self._length]

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns the attention of new tokens to all tokens read, of the query's shape, [1, heads,
        seq, head_dim]; stores their key and value, [1, kv_heads, seq, head_dim]."""
        _, num_heads, seq_len, head_dim = key.shape
        if layer not in self._stored:
            shape = (1, num_heads, len(self.cos), head_dim)
            self._stored[layer] = key.new_empty(shape), value.new_empty(shape)
        first, end = self._length - seq_len, self._length
        for stored, new in zip(self._stored[layer], (key, value), strict=True):
            stored[:, :, first:end] = new
        keys, values = (stored[:, :, :end] for stored in self._stored[layer])
        positions = torch.arange(end, device=key.device)
        mask = positions <= positions[first:, None]
        is_grouped = query.shape[1] != num_heads
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, enable_gqa=is_grouped
        )

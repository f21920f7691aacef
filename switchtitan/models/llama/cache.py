"""Keys and values of the tokens that a LLaMA has read, so that only the next tokens need theirs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeyValueCache:
    """What `Llama.forward` keeps of one sequence. Not for training.

    Args:
        cos, sin: [capacity, 1, head_dim/2] fp32, the rotary tables of the longest sequence.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self._cos, self._sin = cos, sin
        self._length = 0
        """Tokens read, with those of this forward pass."""
        self._stored: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        """Keys and values [1, kv_heads, capacity, head_dim] of each layer, in the dtype of its
        activations."""

    def next(self, seq_len: int) -> tuple[Tensor, Tensor]:
        """Returns cos and sin [seq, 1, head_dim/2] fp32 of the next `seq_len` tokens.

        Raises:
            ValueError: if the tokens exceed the capacity.
        """
        first, self._length = self._length, self._length + seq_len
        if self._length > len(self._cos):
            raise ValueError(f"{self._length} tokens do not fit a cache of {len(self._cos)}")
        return self._cos[first : self._length], self._sin[first : self._length]

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns the attention of the new tokens to all tokens read, of the query's shape.

        Args:
            query: [1, heads, seq, head_dim], of the new tokens.
            key, value: [1, kv_heads, seq, head_dim], of the new tokens, which are stored.
        """
        _, num_heads, seq_len, head_dim = key.shape
        if layer not in self._stored:
            shape = (1, num_heads, len(self._cos), head_dim)
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

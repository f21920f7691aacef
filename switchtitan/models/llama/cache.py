"""Keys and values of the tokens that a LLaMA has read, so that only the next tokens need theirs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeyValueCache:
    """A `contracts.Cache`, not for training. Each row of the batch has its own number of tokens.

    Args:
        cos, sin: [capacity, 1, head_dim/2] fp32, the rotary tables of the longest sequence, padding
            included.
    """

    def __init__(self, batch_size: int, cos: Tensor, sin: Tensor) -> None:
        self._cos, self._sin = cos, sin
        self._lengths = torch.zeros(batch_size, dtype=torch.int64, device=cos.device)
        self._num_columns = 0
        """Upper bound of `_lengths` that the host knows without waiting for the device."""
        self._positions = self._lengths[:, None]
        """[batch, seq], of the tokens of this forward pass."""
        self._stored: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        """Keys and values [batch, kv_heads, capacity, head_dim] of each layer, in the dtype of its
        activations."""

    def advance(self, num_tokens: Tensor) -> None:
        """See `contracts.Cache`."""
        self._lengths += num_tokens

    def next(self, seq_len: int) -> tuple[Tensor, Tensor]:
        """Returns cos and sin [batch, seq, 1, head_dim/2] fp32 of the next `seq_len` tokens.

        Raises:
            ValueError: if the tokens exceed the capacity.
        """
        self._num_columns += seq_len
        if self._num_columns > len(self._cos):
            raise ValueError(f"{self._num_columns} tokens do not fit a cache of {len(self._cos)}")
        new = torch.arange(seq_len, device=self._cos.device)
        self._positions = positions = self._lengths[:, None] + new
        return self._cos[positions], self._sin[positions]

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns the attention of the new tokens to all tokens read, of the query's shape.

        Args:
            query: [batch, heads, seq, head_dim], of the new tokens.
            key, value: [batch, kv_heads, seq, head_dim], of the new tokens, which are stored.
        """
        if layer not in self._stored:
            batch, num_heads, _, head_dim = key.shape
            shape = (batch, num_heads, len(self._cos), head_dim)
            self._stored[layer] = key.new_zeros(shape), value.new_zeros(shape)
        positions = self._positions[:, None, :, None]
        keys, values = (
            stored.scatter_(2, positions.expand_as(new), new)[:, :, : self._num_columns]
            for stored, new in zip(self._stored[layer], (key, value), strict=True)
        )
        # What padding stored at later positions is overwritten before a token attends to it.
        columns = torch.arange(self._num_columns, device=positions.device)
        is_grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=columns <= positions, enable_gqa=is_grouped
        )

"""Keys and values of the tokens that a LLaMA has read, so that the next tokens need only their own.

Not for training: nothing here can be differentiated.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class KeyValueCache:
    """A `contracts.Cache`. Each row of the batch has its own number of tokens.

    Args:
        num_layers: number of blocks.
        batch_size: number of sequences.
        cos, sin: [capacity, head_dim/2] fp32, the rotary tables of the longest sequence, padding
            included.
    """

    def __init__(self, num_layers: int, batch_size: int, cos: Tensor, sin: Tensor) -> None:
        self._cos, self._sin = cos, sin
        self._capacity = len(cos)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=cos.device)
        """[batch], tokens read so far."""
        self._num_columns = 0
        """Upper bound of `lengths` that the host knows without waiting for the device."""
        self._stores = [_Store(self._capacity) for _ in range(num_layers)]

    def advance(self, num_tokens: Tensor) -> None:
        """Counts the tokens of the last forward pass. Those after them were padding.

        Args:
            num_tokens: [batch] int64.
        """
        self.lengths += num_tokens

    def next(self, seq_len: int) -> tuple[Tensor, Tensor, list["LayerCache"]]:
        """Returns cos and sin of the next `seq_len` tokens, and each layer's cache.

        Returns:
            cos, sin: [batch, 1, seq, head_dim/2] fp32.

        Raises:
            ValueError: if the tokens exceed the capacity.
        """
        self._num_columns += seq_len
        if self._num_columns > self._capacity:
            raise ValueError(
                f"the cache holds {self._capacity} tokens per sequence, and "
                f"{self._num_columns} were to be read"
            )
        device = self.lengths.device
        positions = self.lengths[:, None] + torch.arange(seq_len, device=device)
        keys = torch.arange(self._num_columns, device=device)
        # What padding stored at later positions is overwritten before a token attends to it.
        mask = keys <= positions[:, None, :, None]
        layers = [LayerCache(store, positions, mask) for store in self._stores]
        return self._cos[positions][:, None], self._sin[positions][:, None], layers


class _Store:
    """Keys and values [batch, kv_heads, capacity, head_dim] of one layer, allocated when first
    written, in the dtype of the layer's activations."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._stored: tuple[Tensor, Tensor] | None = None

    def write(self, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new tokens' keys and values; returns those of all positions."""
        if self._stored is None:
            batch, num_heads, _, head_dim = key.shape
            shape = (batch, num_heads, self._capacity, head_dim)
            self._stored = key.new_zeros(shape), value.new_zeros(shape)
        index = positions[:, None, :, None].expand_as(key)
        for stored, new in zip(self._stored, (key, value), strict=True):
            stored.scatter_(2, index, new)
        return self._stored


@dataclass(frozen=True)
class LayerCache:
    """The cache of one layer in one forward pass."""

    store: _Store
    positions: Tensor
    """[batch, seq] int64, of the new tokens."""
    mask: Tensor
    """[batch, 1, seq, keys] bool: which keys each new token attends to."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns the attention of the new tokens to all tokens read, of the query's shape.

        Args:
            query: [batch, heads, seq, head_dim], of the new tokens.
            key, value: [batch, kv_heads, seq, head_dim], of the new tokens, which are stored.
        """
        keys, values = self.store.write(key, value, self.positions)
        num_keys = self.mask.shape[-1]
        return F.scaled_dot_product_attention(
            query,
            keys[:, :, :num_keys],
            values[:, :, :num_keys],
            attn_mask=self.mask,
            enable_gqa=query.shape[1] != key.shape[1],
        )

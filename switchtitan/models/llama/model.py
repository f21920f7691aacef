"""LLaMA (arXiv 2302.13971) and its family, with the module names of Hugging Face's models."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from switchtitan.contracts import (
    ApplyHead,
    Cache,
    CallBlock,
    LanguageModel,
    default_apply_head,
    default_call_block,
)
from switchtitan.models.head import Head, TiedHead
from switchtitan.models.llama.attention import ATTENTION_BACKENDS
from switchtitan.models.llama.cache import KeyValueCache, LayerCache
from switchtitan.models.llama.config import LlamaFamilyConfig
from switchtitan.models.llama.dimensions import LlamaDimensions
from switchtitan.models.llama.rope import rotary_tables, rotate


@dataclass(frozen=True)
class Positions:
    """Inputs that all blocks share in one forward pass.

    The tables are fp32: bf16 would round the cosines to 8 bits. FSDP casts a block's arguments
    unless its policy sets cast_forward_inputs=False.
    """

    cos: Tensor
    """[seq, head_dim/2] fp32; with a cache [batch, 1, seq, head_dim/2]."""
    sin: Tensor
    """Like `cos`."""
    mask: BlockMask | None
    """The attention backend's mask, from the document ids."""


class Attention(nn.Module):
    """Causal self-attention with grouped key and value heads (arXiv 2305.13245)."""

    def __init__(self, dims: LlamaDimensions, backend: str) -> None:
        super().__init__()
        self.head_dim = dims.head_dim
        self.attend = ATTENTION_BACKENDS[backend].load()
        biased = dims.biased_layers
        self.q_proj = nn.Linear(dims.hidden_size, dims.q_size, bias="q_proj" in biased)
        self.k_proj = nn.Linear(dims.hidden_size, dims.kv_size, bias="k_proj" in biased)
        self.v_proj = nn.Linear(dims.hidden_size, dims.kv_size, bias="v_proj" in biased)
        self.o_proj = nn.Linear(dims.q_size, dims.hidden_size, bias="o_proj" in biased)

    def forward(
        self, hidden: Tensor, positions: Positions, cache: LayerCache | None = None
    ) -> Tensor:
        query, key, value = (
            projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projected in (self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden))
        )
        query = rotate(query, positions.cos, positions.sin)
        key = rotate(key, positions.cos, positions.sin)
        if cache is None:
            attended = self.attend(query, key, value, positions.mask)
        else:
            attended = cache.attend(query, key, value)
        return self.o_proj(attended.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202, eq. 6)."""

    def __init__(self, dims: LlamaDimensions) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dims.hidden_size, dims.intermediate_size, bias=False)
        self.up_proj = nn.Linear(dims.hidden_size, dims.intermediate_size, bias=False)
        self.down_proj = nn.Linear(dims.intermediate_size, dims.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Block(nn.Module):
    """Pre-norm attention and MLP with residual connections: [batch, seq, dim] -> same."""

    def __init__(self, dims: LlamaDimensions, backend: str) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(dims.hidden_size, eps=dims.norm_eps)
        self.self_attn = Attention(dims, backend)
        self.post_attention_layernorm = nn.RMSNorm(dims.hidden_size, eps=dims.norm_eps)
        self.mlp = MLP(dims)

    def forward(
        self, hidden: Tensor, positions: Positions, cache: LayerCache | None = None
    ) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), positions, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Decoder(nn.Module):
    """Embedding, blocks, last norm: tokens, document_ids [batch, seq] -> [batch, seq, dim]."""

    def __init__(self, dims: LlamaDimensions, backend: str) -> None:
        super().__init__()
        self.rope, self.head_dim = dims.rope, dims.head_dim
        self.build_mask = ATTENTION_BACKENDS[backend].build_mask
        self.embed_tokens = nn.Embedding(dims.vocab_size, dims.hidden_size)
        self.layers = nn.ModuleList(Block(dims, backend) for _ in range(dims.num_layers))
        self.norm = nn.RMSNorm(dims.hidden_size, eps=dims.norm_eps)

    def forward(
        self, tokens: Tensor, document_ids: Tensor, call_block: CallBlock = default_call_block
    ) -> Tensor:
        cos, sin = self.rotary(tokens.shape[1], tokens.device)
        positions = Positions(cos, sin, self.build_mask(document_ids))
        hidden = self.embed_tokens(tokens)
        for block in self.layers:
            hidden = call_block(block, hidden, positions)
        return self.norm(hidden)

    def rotary(self, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns `rotary_tables` of this model."""
        return rotary_tables(seq_len, self.head_dim, self.rope, device)

    def read_next(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Returns the last hidden states [batch, seq, dim] of the next tokens [batch, seq]."""
        cos, sin, layers = cache.next(tokens.shape[1])
        positions = Positions(cos, sin, None)
        hidden = self.embed_tokens(tokens)
        for block, layer in zip(self.layers, layers, strict=True):
            hidden = block(hidden, positions, layer)
        return self.norm(hidden)


class Llama(LanguageModel):
    """A language model of LLaMA's family: the section's class says which of its parts vary."""

    draws_in_forward: ClassVar[bool] = False

    def __init__(self, dims: LlamaDimensions, backend: str) -> None:
        super().__init__()
        self.dims = dims
        self.model = Decoder(dims, backend)
        self.lm_head = (
            TiedHead(self.model.embed_tokens)
            if dims.tied_head
            else Head(dims.hidden_size, dims.vocab_size)
        )

    def forward(
        self,
        tokens: Tensor,
        document_ids: Tensor,
        apply_head: ApplyHead = default_apply_head,
        cache: Cache | None = None,
    ) -> Tensor:
        """Returns the logits of the next token, or the result of `apply_head`.

        Args:
            tokens: [batch, seq] int64.
            document_ids: [batch, seq] int32, equal for tokens of one document; only flex uses them.
            apply_head: receives the hidden states [batch, seq, dim], in the dtype of the weights,
                and the head.
            cache: as `new_cache` returns it: `tokens` follow those that it has counted, and all
                are of one document, whose ids are not read.

        Returns:
            [batch, seq, vocabulary] in the dtype of the weights, or the result of `apply_head`.
        """
        if cache is None:
            hidden = self.model(tokens, document_ids, self.call_block)
        else:
            assert isinstance(cache, KeyValueCache)
            hidden = self.model.read_next(tokens, cache)
        return apply_head(hidden, self.lm_head)

    def new_cache(self, batch_size: int, capacity: int, device: torch.device) -> KeyValueCache:
        """See `contracts.LanguageModel`."""
        cos, sin = self.model.rotary(capacity, device)
        return KeyValueCache(self.dims.num_layers, batch_size, cos, sin)

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the embedding and the head."""
        return self.dims.vocab_size

    def blocks(self) -> dict[str, nn.Module]:
        """Returns the blocks by qualified name, in order."""
        return {f"model.layers.{index}": block for index, block in enumerate(self.model.layers)}

    def output_head(self) -> nn.Module:
        """See `contracts.LanguageModel`. A tied head has no weight of its own."""
        return self.lm_head

    def outer_units(self) -> list[list[nn.Module]]:
        """Returns the embedding, and the last norm with the head; nothing if the head is tied."""
        if self.dims.tied_head:
            return []
        return [[self.model.embed_tokens], [self.model.norm, self.lm_head]]

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Returns ones for norms, zeros for biases, otherwise N(0, `initial_std`^2); fp32 on the
        CPU."""
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=torch.float32, device="cpu")
        if name.endswith(".bias"):
            return torch.zeros(shape, dtype=torch.float32, device="cpu")
        value = torch.empty(shape, dtype=torch.float32, device="cpu")
        return value.normal_(0.0, self.initial_std(name), generator=generator)

    def initial_std(self, name: str) -> float:
        """Returns the standard deviation of a parameter that starts with a normal distribution."""
        return self.dims.init_std

    def num_flops_per_token(self, seq_len: int) -> int:
        """See `LlamaDimensions.num_flops_per_token`."""
        return self.dims.num_flops_per_token(seq_len)


def build_llama(config: LlamaFamilyConfig) -> Llama:
    """Builds the model on the current default device (the caller sets meta)."""
    return Llama(config.dimensions(), config.attention)

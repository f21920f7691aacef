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
from switchtitan.models.llama.attention import build_mask, load_attention
from switchtitan.models.llama.cache import KeyValueCache
from switchtitan.models.llama.config import LlamaFamilyConfig
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
    cache: KeyValueCache | None = None
    """None in training."""


class Attention(nn.Module):
    """Causal self-attention with grouped key and value heads (arXiv 2305.13245)."""

    def __init__(self, config: LlamaFamilyConfig) -> None:
        super().__init__()
        self.head_dim = config.head_width
        self.attend = load_attention(config.attention)
        hidden_size, biased = config.sizes.hidden_size, config.biased_layers
        self.q_proj = nn.Linear(hidden_size, config.q_size, bias="q_proj" in biased)
        self.k_proj = nn.Linear(hidden_size, config.kv_size, bias="k_proj" in biased)
        self.v_proj = nn.Linear(hidden_size, config.kv_size, bias="v_proj" in biased)
        self.o_proj = nn.Linear(config.q_size, hidden_size, bias="o_proj" in biased)

    def forward(self, hidden: Tensor, positions: Positions) -> Tensor:
        query, key, value = (
            projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projected in (self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden))
        )
        query = rotate(query, positions.cos, positions.sin)
        key = rotate(key, positions.cos, positions.sin)
        if positions.cache is None:
            attended = self.attend(query, key, value, positions.mask)
        else:
            attended = positions.cache.attend(self, query, key, value)
        return self.o_proj(attended.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202, eq. 6)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Block(nn.Module):
    """Pre-norm attention and MLP with residual connections: [batch, seq, dim] -> same."""

    def __init__(self, config: LlamaFamilyConfig) -> None:
        super().__init__()
        hidden_size, intermediate_size, _, _ = config.sizes
        self.input_layernorm = nn.RMSNorm(hidden_size, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(hidden_size, eps=config.norm_eps)
        self.mlp = MLP(hidden_size, intermediate_size)

    def forward(self, hidden: Tensor, positions: Positions) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), positions)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Decoder(nn.Module):
    """Embedding, blocks, last norm: tokens, document_ids [batch, seq] -> [batch, seq, dim]."""

    def __init__(self, config: LlamaFamilyConfig) -> None:
        super().__init__()
        sizes = config.sizes
        self.rope, self.head_dim, self.attention = config.rope, config.head_width, config.attention
        self.embed_tokens = nn.Embedding(config.vocab_size, sizes.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(sizes.num_layers))
        self.norm = nn.RMSNorm(sizes.hidden_size, eps=config.norm_eps)

    def forward(
        self,
        tokens: Tensor,
        document_ids: Tensor,
        call_block: CallBlock = default_call_block,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        seq_len = tokens.shape[1]
        if cache is None:
            mask = build_mask(self.attention, document_ids)
            positions = Positions(*self.rotary(seq_len, tokens.device), mask)
        else:
            positions = Positions(*cache.next(seq_len), None, cache)
        hidden = self.embed_tokens(tokens)
        for block in self.layers:
            hidden = call_block(block, hidden, positions)
        return self.norm(hidden)

    def rotary(self, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns `rotary_tables` of this model."""
        return rotary_tables(seq_len, self.head_dim, self.rope, device)


class Llama(LanguageModel):
    """A language model of LLaMA's family: the section's class says which of its parts vary.

    Builds on the current default device (the caller sets meta).
    """

    draws_in_forward: ClassVar[bool] = False

    def __init__(self, config: LlamaFamilyConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = (
            TiedHead(self.model.embed_tokens)
            if config.tied_head
            else Head(config.sizes.hidden_size, config.vocab_size)
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
        assert cache is None or isinstance(cache, KeyValueCache)
        hidden = self.model(tokens, document_ids, self.call_block, cache)
        return apply_head(hidden, self.lm_head)

    def new_cache(self, batch_size: int, capacity: int, device: torch.device) -> KeyValueCache:
        """See `contracts.LanguageModel`."""
        return KeyValueCache(batch_size, *self.model.rotary(capacity, device))

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the embedding and the head."""
        return self.config.vocab_size

    def blocks(self) -> dict[str, nn.Module]:
        """Returns the blocks by qualified name, in order."""
        return {f"model.layers.{index}": block for index, block in enumerate(self.model.layers)}

    def output_head(self) -> nn.Module:
        """See `contracts.LanguageModel`. A tied head has no weight of its own."""
        return self.lm_head

    def outer_units(self) -> list[list[nn.Module]]:
        """Returns the embedding, and the last norm with the head; nothing if the head is tied."""
        if self.config.tied_head:
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
        return self.config.init_std

    def num_flops_per_token(self, seq_len: int) -> int:
        """Returns 6 N + 12 L H Q S, forward and backward (PaLM, arXiv 2204.02311, appendix B).

        N is the number of weights of all linear layers and the head, without embedding, norms and
        biases; L layers, H heads of Q features, S = `seq_len`. As in PaLM, attention is not halved
        for the causal mask, so that MFU is comparable with published figures.
        """
        config = self.config
        num_weights = sum(out * into for out, into in config.linear_shapes().values())
        if config.tied_head:
            num_weights += config.vocab_size * config.sizes.hidden_size
        return 6 * num_weights + 12 * config.sizes.num_layers * config.q_size * seq_len

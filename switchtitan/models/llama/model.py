"""LLaMA (arXiv 2302.13971) and its family, with the module names of Hugging Face's models."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from switchtitan.contracts import ApplyHead, LanguageModel, Reparametrized, default_apply_head
from switchtitan.models.llama.attention import KeyValueCache, build_mask, load_attention
from switchtitan.models.llama.config import LlamaFamilyConfig
from switchtitan.models.loss import Head, TiedHead


@dataclass(frozen=True)
class Positions:
    """Inputs that all blocks share in one forward pass.

    The tables are fp32: bf16 would round the cosines to 8 bits.
    """

    cos: Tensor
    """[seq, 1, head_dim/2] fp32. `sin` is alike."""
    sin: Tensor
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
        hidden_size, linear = config.sizes.hidden_size, config.build_linear
        self.q_proj = linear("q_proj", hidden_size, config.q_size)
        self.k_proj = linear("k_proj", hidden_size, config.kv_size)
        self.v_proj = linear("v_proj", hidden_size, config.kv_size)
        self.o_proj = linear("o_proj", config.q_size, hidden_size)

    def forward(self, hidden: Tensor, positions: Positions) -> Tensor:
        def rotate_heads(projected: Tensor) -> Tensor:
            # Before heads and positions change places: afterwards, Inductor copies the results and
            # their gradients.
            heads = projected.unflatten(-1, (-1, self.head_dim))
            return rotate(heads, positions.cos, positions.sin)

        query, key, value = _apply_together(hidden, self.q_proj, self.k_proj, self.v_proj)
        query, key = rotate_heads(query), rotate_heads(key)
        value = value.unflatten(-1, (-1, self.head_dim))
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
        if positions.cache is None:
            attended = self.attend(query, key, value, positions.mask)
        else:
            attended = positions.cache.attend(self, query, key, value)
        return self.o_proj(attended.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: LlamaFamilyConfig) -> None:
        super().__init__()
        (hidden_size, intermediate_size, _, _), linear = config.sizes, config.build_linear
        self.gate_proj = linear("gate_proj", hidden_size, intermediate_size)
        self.up_proj = linear("up_proj", hidden_size, intermediate_size)
        self.down_proj = linear("down_proj", intermediate_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = _apply_together(hidden, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm attention and MLP with residual connections: [batch, seq, dim] -> same."""

    def __init__(self, config: LlamaFamilyConfig) -> None:
        super().__init__()
        hidden_size = config.sizes.hidden_size
        self.input_layernorm = nn.RMSNorm(hidden_size, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, positions: Positions) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), positions)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Decoder(nn.Module):
    """Holds embedding, blocks and last norm, under the names of Hugging Face's LLaMA."""

    def __init__(self, config: LlamaFamilyConfig) -> None:
        super().__init__()
        sizes = config.sizes
        self.embed_tokens = nn.Embedding(config.vocab_size, sizes.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(sizes.num_layers))
        self.norm = nn.RMSNorm(sizes.hidden_size, eps=config.norm_eps)


class Llama(LanguageModel):
    """A language model of LLaMA's family: the section's class says which of its parts vary."""

    def __init__(self, config: LlamaFamilyConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = (
            TiedHead(self.model.embed_tokens)
            if config.tied_head
            else Head(config.sizes.hidden_size, config.vocab_size)
        )
        # Counted before a method replaces layers.
        self._num_multiplied = sum(
            module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear)
        )
        if config.tied_head:
            self._num_multiplied += config.vocab_size * config.sizes.hidden_size

    def forward(
        self,
        tokens: Tensor,
        document_ids: Tensor,
        apply_head: ApplyHead = default_apply_head,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """See `LanguageModel`. Only flex reads the document ids; with a cache, the sequence is one
        document."""
        seq_len = tokens.shape[1]
        if cache is None:
            mask = build_mask(self.config.attention, document_ids)
            positions = Positions(*rotary_tables(self.config, seq_len, tokens.device), mask)
        else:
            positions = Positions(*cache.next(seq_len), None, cache)
        hidden = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            hidden = block(hidden, positions)
        return apply_head(self.model.norm(hidden), self.lm_head)

    def new_cache(self, capacity: int, device: torch.device) -> KeyValueCache:
        return KeyValueCache(*rotary_tables(self.config, capacity, device))

    def blocks(self) -> dict[str, nn.Module]:
        return {f"model.layers.{index}": block for index, block in enumerate(self.model.layers)}

    def output_head(self) -> nn.Module:
        return self.lm_head

    def hidden_size(self) -> int | None:
        return self.config.sizes.hidden_size

    def outer_units(self) -> list[list[nn.Module]]:
        """The embedding, and the last norm with the head; nothing if the head is tied."""
        if self.config.tied_head:
            return []
        return [[self.model.embed_tokens], [self.model.norm, self.lm_head]]

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Ones for norms, zeros for biases, otherwise N(0, `initial_std`^2)."""
        value = torch.zeros(shape, dtype=torch.float32, device="cpu")
        if name.endswith("norm.weight"):
            return value.fill_(1.0)
        if name.endswith(".bias"):
            return value
        return value.normal_(0.0, self.initial_std(name), generator=generator)

    def initial_std(self, name: str) -> float:
        """The standard deviation of a parameter that starts with a normal distribution."""
        config, exponent = self.config, 0.0
        if name.startswith("lm_head."):
            exponent = 1.0
        elif name.startswith("model.layers."):
            exponent = 0.5
        hidden_size = config.sizes.hidden_size
        ratio = (config.tuned_hidden_size or hidden_size) / hidden_size
        return config.init_std * ratio**exponent

    def num_flops_per_token(self, seq_len: int) -> int:
        """Returns 6 N + 12 L H Q S, forward and backward (PaLM, arXiv 2204.02311, appendix B).

        N is the number of weights of all linear layers and the head, without embedding, norms and
        biases; L layers, H heads of Q features, S = `seq_len`. As in PaLM, attention is not halved
        for the causal mask, so that MFU is comparable with published figures.
        """
        config = self.config
        attention = 12 * config.sizes.num_layers * config.q_size * seq_len
        return 6 * self._num_multiplied + attention


def _apply_together(hidden: Tensor, first: nn.Module, *others: nn.Module) -> tuple[Tensor, ...]:
    if isinstance(first, Reparametrized):
        return first.forward_together(hidden, others)
    return first(hidden), *(layer(hidden) for layer in others)


# Rotary position embeddings, and their scaling to longer contexts.
def rotary_frequencies(config: LlamaFamilyConfig, device: torch.device) -> Tensor:
    """Returns the angle per position of each pair of features, [head_dim/2] in fp32.

    `default` has theta^(-2i/head_dim). `linear` divides all of them by `factor` (arXiv 2306.15595,
    eq. 4). `llama3` (LLaMA 3.1) divides those that turn at most `low_freq_factor` times within
    `original_positions`, keeps those that turn at least `high_freq_factor` times, and interpolates
    between the two, linearly in the number of turns.
    """
    dim, factor = config.head_width, config.rope_factor
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    frequencies = 1.0 / config.rope_theta**exponents
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    positions = config.rope_original_positions
    if factor is None:
        return frequencies
    if low is None or high is None or positions is None:  # linear
        return frequencies / factor
    turns = frequencies * (positions / (2 * math.pi))
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def rotary_tables(
    config: LlamaFamilyConfig, seq_len: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns cos, sin of position * frequency, each [seq, 1, head_dim/2] in fp32.

    Rotary embeddings (RoFormer, arXiv 2104.09864, eq. 34) in Hugging Face LLaMA's half-split
    layout: feature i of a head is paired with feature i + head_dim/2, where the paper pairs
    neighbours. The two differ by a fixed permutation of the rows of q_proj and k_proj.
    """
    positions = torch.arange(seq_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, rotary_frequencies(config, device)).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(features: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair of features by its position's angle, in fp32 or wider.

    Args:
        features: [batch, seq, heads, head_dim], of any floating dtype, which the result keeps.
        cos, sin: [seq, 1, head_dim/2] in fp32.
    """
    wide = torch.promote_types(features.dtype, cos.dtype)
    first, second = (half.to(wide) for half in features.chunk(2, dim=-1))
    # Rounded before they are joined: Inductor may store what is joined in between.
    halves = first * cos - second * sin, second * cos + first * sin
    return torch.cat([half.to(features.dtype) for half in halves], dim=-1)

"""Rotary position embeddings, and their scaling to longer contexts."""

import math

import torch
from torch import Tensor

from switchtitan.models.llama.config import LlamaFamilyConfig


def rotary_frequencies(config: LlamaFamilyConfig, device: torch.device) -> Tensor:
    """Returns the angle per position of each pair of features, [head_dim/2] in fp32.

    `default` has theta^(-2i/head_dim). `linear` divides all of them by `factor` (arXiv 2306.15595,
    eq. 4). `llama3` (LLaMA 3.1) divides those that turn at most `low_freq_factor` times within
    `original_positions`, keeps those that turn at least `high_freq_factor` times, and interpolates
    between the two, linearly in the number of turns.
    """
    dim, scaling = config.head_width, config.rope_scaling
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_type == "linear":
        return frequencies / scaling["factor"]
    if config.rope_type == "llama3":
        turns = frequencies * (scaling["original_positions"] / (2 * math.pi))
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / scaling["factor"])
    return frequencies


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

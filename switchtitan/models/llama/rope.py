"""Rotary embeddings (RoFormer, arXiv 2104.09864, eq. 34) in Hugging Face LLaMA's half-split layout.

Feature i of a head is paired with feature i + head_dim/2; the paper pairs neighbours. The two
differ by a fixed permutation of the rows of q_proj and k_proj. Weights here are interchangeable
with Hugging Face's.
"""

import torch
from torch import Tensor


def rotary_tables(
    seq_len: int, head_dim: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns cos, sin of position * theta^(-2i/head_dim), each [seq, head_dim/2] in fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(seq_len, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rotate(features: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair of features by its position's angle, in fp32 or wider.

    Args:
        features: [batch, heads, seq, head_dim], of any floating dtype, which the result keeps.
        cos, sin: [seq, head_dim/2] in fp32.
    """
    first, second = features.to(torch.promote_types(features.dtype, cos.dtype)).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(features.dtype)

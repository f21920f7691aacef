"""Random vectors that are a pure function of a key and their place: nothing is stored, and any part can be drawn by itself."""

import torch
from torch import Tensor

from switchtitan.methods.splitmix import splitmix64

_NUM_BITS = 24
"""Random bits in a value: as many as fp32 holds exactly."""


def draw_vectors(keys: Tensor, bounds: Tensor, elements: range) -> Tensor:
    """Vectors whose elements are uniform on [-bound, bound), the same bits on every device; a few kernels in all.

    Args:
        keys: [vectors] int64, a vector's identity.
        bounds: [vectors] fp32.
        elements: those wanted of each vector.

    Returns:
        [vectors, elements] fp32.
    """
    indices = torch.arange(elements.start, elements.stop, device=keys.device)
    # The sign comes along: whole numbers in [-2^23, 2^23).
    values = splitmix64(keys.unsqueeze(1), indices) >> (64 - _NUM_BITS)
    return values.to(torch.float32) * (bounds * 2.0 ** (1 - _NUM_BITS)).unsqueeze(1)

"""Random vectors that are a pure function of a key and their place: nothing is stored, and any part can be drawn by itself."""

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, fig. 16): the increment is
# 2^64 over the golden ratio, made odd; the multipliers are Stafford's variant 13 of MurmurHash3's finalizer. As signed numbers.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64

_NUM_BITS = 24
"""Random bits in a value: as many as fp32 holds exactly."""


def splitmix64(seeds: Tensor, indices: Tensor) -> Tensor:
    """Output number `indices` 0, 1, ... of a SplitMix64 generator seeded with `seeds`; 64-bit numbers read as signed ones.

    Args:
        seeds, indices: int64, of shapes that broadcast.
    """
    # Integer products wrap around, on the CPU as on CUDA.
    state = seeds + (indices + 1) * _INCREMENT
    state ^= _shift_right(state, 30)
    state *= _MULTIPLIER_1
    state ^= _shift_right(state, 27)
    state *= _MULTIPLIER_2
    state ^= _shift_right(state, 31)
    return state


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


def _shift_right(values: Tensor, num_bits: int) -> Tensor:
    """A shift that fills with zeros, where torch repeats the sign."""
    return (values >> num_bits) & ((1 << (64 - num_bits)) - 1)

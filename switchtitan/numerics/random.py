"""Random numbers that depend on a name or a step, not on earlier draws, so no state is saved."""

import hashlib

import torch
from torch import Tensor


def generator_for(seed: int, name: str) -> torch.Generator:
    """Returns a CPU generator seeded by (seed, name), equal on every rank and machine."""
    return torch.Generator().manual_seed(_mixed(f"{seed}:{name}"))


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seeds torch's global generators, used by dropout, for step `step` (from 0)."""
    torch.manual_seed(_mixed(f"{seed}:dropout:{step}:{rank}"))


def _mixed(key: str) -> int:
    """Hashes `key` to 63 bits: a seed has 64, and the sign bit is left out."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014,
# fig. 16), with Stafford's variant 13 of MurmurHash3's finalizer. As signed numbers.
_INCREMENT_64 = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS_64 = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_SHIFTS_64 = (30, 27, 31)

_DRAWN_AT_A_TIME = 1 << 22
"""Elements of random vectors that are drawn at a time."""

# In 32 bits: MurmurHash3's 32-bit finalizer itself (Austin Appleby, public domain).
_INCREMENT_32 = 0x9E3779B9 - 2**32
_MULTIPLIERS_32 = (0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32)
_SHIFTS_32 = (16, 13, 16)


def splitmix64(seeds: Tensor, indices: Tensor) -> Tensor:
    """Returns outputs number `indices` 0, 1, ... of SplitMix64 generators seeded with `seeds`; both
    are int64, of shapes that broadcast."""
    # One operation on tensors of full size instead of three.
    state = torch.add(seeds + _INCREMENT_64, indices, alpha=_INCREMENT_64)
    return _mix_(state, _SHIFTS_64, _MULTIPLIERS_64)


def advance64(seeds: Tensor, counts: Tensor) -> Tensor:
    """Returns seeds of generators that are `counts` outputs ahead, or behind if negative."""
    return seeds + counts * _INCREMENT_64


def draw_vectors(keys: Tensor, slots: Tensor, width: int, bound: float) -> Tensor:
    """Draws vectors number `slots` uniformly from [-bound, bound), [slots, width] fp32.

    A vector is a function of its key and slot, with the same bits on every device, so that any rank
    can draw any of them.

    Args:
        keys: [slots] int64, or one key, 0-dim.
        slots: [slots] int64, on the device of the result.
    """
    elements = torch.arange(width, device=slots.device)
    vectors = splitmix64(keys, slots)
    # In parts, since integers take twice the memory of the result.
    parts = vectors.split(max(1, _DRAWN_AT_A_TIME // width))
    drawn = [as_uniform(splitmix64(part[:, None], elements)) * bound for part in parts]
    return torch.cat(drawn) if len(drawn) > 1 else drawn[0]


def as_uniform(bits: Tensor) -> Tensor:
    """Returns fp32 values, uniform in [-1, 1), from random int64."""
    # 24 bits, as many as the significand of fp32 has. The shift keeps the sign.
    return (bits >> 40).to(torch.float32) * 2.0**-23


def splitmix32(seeds: Tensor, indices: Tensor) -> Tensor:
    """`splitmix64` in int32; a generator's outputs repeat after 2^32."""
    state = seeds + (indices + 1) * _INCREMENT_32
    return _mix_(state, _SHIFTS_32, _MULTIPLIERS_32)


def _mix_(state: Tensor, shifts: tuple[int, int, int], multipliers: tuple[int, int]) -> Tensor:
    """A bijection in which every bit depends on every bit, in place."""
    # Integer products wrap around, on the CPU as on CUDA.
    state ^= _shift_right(state, shifts[0])
    state *= multipliers[0]
    state ^= _shift_right(state, shifts[1])
    state *= multipliers[1]
    state ^= _shift_right(state, shifts[2])
    return state


def _shift_right(values: Tensor, num_bits: int) -> Tensor:
    """A shift that fills with zeros, where torch repeats the sign."""
    return (values >> num_bits) & ((1 << (torch.iinfo(values.dtype).bits - num_bits)) - 1)

"""The order of sequences: each epoch is a permutation that can be evaluated at any position."""

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
"""Four rounds make a Feistel network with wide halves a strong pseudo-random permutation (Luby and
Rackoff 1988). Small corpora have narrow halves, which need more rounds."""


def sequence_index(seed: int, position: NDArray[np.int64], num_sequences: int) -> NDArray[np.int64]:
    """Returns the sequences at the given positions of the endless global order.

    Epoch e covers positions [e * num_sequences, (e + 1) * num_sequences) and visits every sequence
    once, in its own order.

    Args:
        position: [...], 0 or more.
    """
    epochs, offsets = np.divmod(np.asarray(position, dtype=np.int64), num_sequences)
    indices = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = permute(offsets[chosen], num_sequences, seed=seed, epoch=int(epoch))
    return indices


def permute(offsets: NDArray[np.int64], size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Maps offsets [...] in [0, size) through a bijection of [0, size) that (seed, epoch) chooses.

    A balanced Feistel network permutes [0, 2^(2h)), the smallest such range that holds `size`. A
    value outside [0, size) is permuted again until it is inside, which keeps the map a bijection
    (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 3). The
    range is below 4 * size, so few values need many passes."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    values = offsets.astype(np.uint64).reshape(-1)
    outside = np.arange(values.size)
    while outside.size:
        left, right = values[outside] >> shift, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        values[outside] = (left << shift) | right
        outside = outside[values[outside] >= size]
    return values.astype(np.int64).reshape(offsets.shape)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators")."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

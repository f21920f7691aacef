"""Generators that depend on a name, so that what is drawn does not depend on order or on the number of ranks."""

import hashlib

import torch


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator seeded by (seed, name), the same on every rank and machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    # manual_seed takes 64 bits; the sign bit is left out.
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

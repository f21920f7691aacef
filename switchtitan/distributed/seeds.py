"""Random numbers that depend on a name or a step, not on what was drawn before; so there is no state to save."""

import hashlib

import torch


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator seeded by (seed, name), the same on every rank and machine."""
    return torch.Generator().manual_seed(_mixed(f"{seed}:{name}"))


def seed_dropout(seed: int, num_batches: int, rank: int) -> None:
    """Seeds torch's global generators, which dropout draws from, for the batch that comes after `num_batches` others."""
    torch.manual_seed(_mixed(f"{seed}:dropout:{num_batches}:{rank}"))


def _mixed(text: str) -> int:
    """63 bits that depend on all of `text`: seeding takes 64, and the sign bit is left out."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1

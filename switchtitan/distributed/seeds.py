"""Random numbers that depend on a name or a step, not on earlier draws, so no state is saved."""

import hashlib

import torch


def generator_for(seed: int, name: str) -> torch.Generator:
    """Returns a CPU generator seeded by (seed, name), equal on every rank and machine."""
    return torch.Generator().manual_seed(_mixed(f"{seed}:{name}"))


def seed_dropout(seed: int, num_batches: int, rank: int) -> None:
    """Seeds torch's global generators, used by dropout, for batch `num_batches` (from 0)."""
    torch.manual_seed(_mixed(f"{seed}:dropout:{num_batches}:{rank}"))


def _mixed(key: str) -> int:
    """Hashes `key` to 63 bits: a seed has 64, and the sign bit is left out."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1

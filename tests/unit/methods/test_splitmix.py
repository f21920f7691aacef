"""The generators are those published, in 64 bits and in 32."""

import pytest
import torch
from support.switchlora_reference import splitmix64_outputs

from switchtitan.distributed.seeds import splitmix32, splitmix64

INCREMENT_32 = 0x9E3779B9


def as_int32(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31


def test_generator_gives_the_published_outputs() -> None:
    # Seed 1234567: test vectors of rosettacode.org (Pseudo-random numbers/Splitmix64).
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    ours = splitmix64(torch.tensor(1234567), torch.arange(5))
    assert (
        [output % 2**64 for output in ours.tolist()] == published == splitmix64_outputs(1234567, 5)
    )


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_generator_wraps_around_as_unsigned_numbers_do(seed: int) -> None:
    ours = splitmix64(torch.tensor(seed), torch.arange(40))
    assert [output % 2**64 for output in ours.tolist()] == splitmix64_outputs(seed % 2**64, 40)


@pytest.mark.parametrize("index", [0, 1, 5, 2**31 - 1])
def test_the_32_bit_generator_ends_as_murmurhash3_does(index: int) -> None:
    # Published hashes of the empty string with seeds 0, 1, 2^32 - 1 are the finalizer alone.
    published = {0: 0, 1: 0x514E28B7, 2**32 - 1: 0x81F16F39}
    seeds = [as_int32(state - (index + 1) * INCREMENT_32) for state in published]
    ours = splitmix32(
        torch.tensor(seeds, dtype=torch.int32), torch.tensor(index, dtype=torch.int32)
    )
    assert ours.dtype == torch.int32
    assert [output % 2**32 for output in ours.tolist()] == list(published.values())

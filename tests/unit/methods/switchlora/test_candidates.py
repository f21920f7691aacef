"""Candidates on the host are those in buffers; drawn ones are those of the definition."""

import pytest
import torch
from support.switchlora_layers import differing_with_host_candidates, draw_few_at_a_time
from support.switchlora_reference import constant_candidates, splitmix64_outputs

from switchtitan.numerics.random import draw_vectors, generator_for, splitmix32, splitmix64


# A spare candidate of the first two layers is taken again at once; and layers with many of them.
@pytest.mark.parametrize("shapes", [[(7, 6), (6, 13), (23, 17)], [(17, 20), (23, 17)]])
def test_waiting_on_the_host_gives_the_same_bits(shapes):
    assert differing_with_host_candidates(shapes, "cpu") == []


def test_drawn_vectors_are_those_of_the_definition_in_any_part(monkeypatch):
    draw_few_at_a_time(monkeypatch, 3 * 31)
    expected = constant_candidates(5, "layer.lora_a", 7, 31, bound=0.3)
    key = torch.tensor(generator_for(5, "layer.lora_a").initial_seed())
    for slots in ([0, 1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6], [6, 0, 3]):
        found = draw_vectors(key, torch.tensor(slots), 31, 0.3)
        assert torch.equal(found, expected[slots])


# Seed 1234567: test vectors of rosettacode.org (Pseudo-random numbers/Splitmix64).
PUBLISHED = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]


@pytest.mark.parametrize("seed", [1234567, 0, -1, 2**63 - 1, -(2**63)])
def test_the_generator_gives_the_published_outputs_and_wraps_around_as_unsigned_numbers_do(seed):
    assert splitmix64_outputs(1234567, 5) == PUBLISHED
    outputs = splitmix64(torch.tensor(seed), torch.arange(40)).tolist()
    assert [output % 2**64 for output in outputs] == splitmix64_outputs(seed % 2**64, 40)


@pytest.mark.parametrize("index", [0, 5, 2**31 - 1])
def test_the_32_bit_generator_ends_as_murmurhash3_does(index):
    # Published hashes of the empty string with seeds 0, 1, 2^32 - 1 are the finalizer alone.
    published = {0: 0, 1: 0x514E28B7, 2**32 - 1: 0x81F16F39}
    seeds = [(state - (index + 1) * 0x9E3779B9 + 2**31) % 2**32 - 2**31 for state in published]
    ours = splitmix32(
        torch.tensor(seeds, dtype=torch.int32), torch.tensor(index, dtype=torch.int32)
    )
    assert ours.dtype == torch.int32
    assert [output % 2**32 for output in ours.tolist()] == list(published.values())

"""Candidates on the host are those in buffers; drawn ones are those of the definition."""

from functools import partial

import pytest
import torch
from support.small_llama import initial_tensors
from support.switchlora_layers import (
    build_optimizer,
    draw_few_at_a_time,
)
from support.switchlora_reference import constant_candidates, splitmix64_outputs
from torch import nn

from switchtitan.distributed.random import draw_vectors, generator_for, splitmix32, splitmix64
from switchtitan.methods.switchlora import SwitchLora, SwitchLoraConfig
from switchtitan.optim.adamw import AdamWConfig

SEED = 4
RANK = 5
# A spare candidate of the first two layers is taken again at once; and layers with many of them.
SHAPES = [[(7, 6), (6, 13), (23, 17)], [(17, 20), (23, 17)]]


def build(shapes, device, **keys):
    """Layers that switch a vector of each factor in every step, and their optimizer."""
    config = SwitchLoraConfig(rank=RANK, interval=RANK, freeze_steps=0, decay="constant", **keys)
    method, layers = SwitchLora(config, 500, SEED), {}
    for index, (out, in_) in enumerate(shapes):
        name = f"layer{index}"
        layer = method.build_layer(name, nn.Linear(in_, out, bias=False))
        weight = torch.randn(out, in_, generator=generator_for(index, "weight")) / in_**0.5
        layer.load_state_dict(initial_tensors(layer, weight, partial(generator_for, index)))
        layers[name] = layer.to(device)
        for buffer in layer.host_buffers:
            setattr(layer, buffer, layer.get_buffer(buffer).cpu())
    candidates = method.candidates_of(layers)
    adamw = AdamWConfig(lr=3e-4)
    return layers, build_optimizer(config, adamw, list(layers.values()), 500, candidates)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_waiting_on_the_host_gives_the_same_bits(shapes, device):
    here, optimizer_here = build(shapes, device)
    there, optimizer_there = build(shapes, device, candidates_device="host")
    here, there = nn.ModuleDict(here), nn.ModuleDict(there)
    assert {parameter.device.type for parameter in there.parameters()} == {device}
    assert {buffer.device.type for buffer in there.buffers()} == {"cpu"}
    generator = torch.Generator().manual_seed(3)
    for step in range(60):
        for one, other in zip(here.parameters(), there.parameters(), strict=True):
            if one.requires_grad:
                one.grad = torch.randn(one.shape, generator=generator).to(device)
                other.grad = one.grad.clone()
        optimizer_here.step()
        optimizer_there.step()
        if step % 7 == 0:  # between them, vectors are on their way
            optimizer_there.state_dict()
            found = there.state_dict()
            for name, tensor in here.state_dict().items():
                assert torch.equal(found[name].to(device), tensor), (step, name)
    total = optimizer_here.metrics()["switch/vectors_switched_total"]
    assert total > 3 * 2 * 17, "all have come back"


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

"""Candidates in buffers, on the host, or drawn: where they wait changes nothing else."""

import pytest
import torch
from support.switchlora_layers import (
    build_optimizer,
    draw_few_at_a_time,
    set_gradients,
)
from support.switchlora_reference import constant_candidates, splitmix64_outputs
from torch import nn

from switchtitan.distributed.random import draw_vectors, generator_for, splitmix32, splitmix64
from switchtitan.methods.lowrank.linear import balanced_bounds
from switchtitan.methods.switchlora import SwitchLora, SwitchLoraConfig
from switchtitan.optim import AdamWConfig

# (out, in, rank): wide, tall, and one whose only spare candidate is reused as soon as it returns
SHAPES = [(5, 7, 2), (23, 14, 9), (31, 64, 30), (64, 48, 13)]
SEED = 4


def build(shapes, device="cpu", **keys):
    """Layers of equal rank whose optimizer only switches: learning rate 0, gradients of zero."""
    rank = shapes[0][2]
    config = SwitchLoraConfig(rank=rank, interval=rank, freeze_steps=0, decay="constant", **keys)
    method, layers = SwitchLora(config, 500, SEED), {}
    for index, (out, in_, _) in enumerate(shapes):
        name = f"layer{index}"
        layer = method.build_layer(name, nn.Linear(in_, out, bias=False))
        weight = torch.randn(out, in_, generator=generator_for(index, "weight")) / in_**0.5
        layer.load_state_dict(
            layer.initial_tensors(
                weight, lambda local_name, name=name: generator_for(SEED, f"{name}.{local_name}")
            )
        )
        layers[name] = layer.to(device)
        for buffer in layer.host_buffers:
            setattr(layer, buffer, layer.get_buffer(buffer).cpu())
    layers_of = list(layers.values())
    candidates = method.candidates_of(layers)
    optimizer = build_optimizer(config, AdamWConfig(lr=1e-3), layers_of, 500, candidates)
    optimizer.set_lr(0.0)
    set_gradients(layers_of, 0.0)
    return layers_of, optimizer


@pytest.mark.parametrize("shape", SHAPES)
def test_a_drawn_vector_in_use_is_the_candidate_of_its_slot_always_the_same(shape):
    """Without training: from the start, and for three rounds of the ring."""
    out, in_, rank = shape
    count = min(out, in_)
    (layer,), optimizer = build([shape], candidates="constant")
    vectors_a, vectors_b = (
        constant_candidates(SEED, f"layer0.{name}", count, width, bound)
        for name, width, bound in zip(
            ("lora_a", "lora_b"), (in_, out), balanced_bounds(*shape), strict=True
        )
    )
    slots_a, slots_b = {}, {}
    for i in range(rank):
        slots_a[i] = slots_b[(rank // 2 + i) % rank] = count - rank + i
    for switched in range(3 * count):
        assert torch.equal(layer.lora_a, vectors_a[[slots_a[i] for i in range(rank)]])
        assert torch.equal(layer.lora_b, vectors_b[[slots_b[i] for i in range(rank)]])
        optimizer.step()
        slots_a[switched % rank] = slots_b[(rank // 2 + switched) % rank] = switched % count


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_waiting_on_the_host_gives_the_same_bits(device):
    # Layers of equal rank: only the first one's spare candidates return at once.
    keys = {"shapes": [(7, 6, 5), (6, 13, 5), (23, 17, 5)], "device": device}
    here, optimizer_here = build(**keys)
    there, optimizer_there = build(**keys, candidates_device="host")
    assert {one.lora_a.device.type for one in here + there} == {device}
    assert {buffer.device.type for layer in there for buffer in layer.buffers()} == {"cpu"}
    generator = torch.Generator().manual_seed(3)
    for step in range(60):
        for optimizer in (optimizer_here, optimizer_there):
            optimizer.set_lr(0.3)
        for one, other in zip(here, there, strict=True):
            for factor in ("lora_a", "lora_b"):
                shape = one.get_parameter(factor).shape
                gradient = torch.randn(shape, generator=generator).to(device)
                one.get_parameter(factor).grad = gradient
                other.get_parameter(factor).grad = gradient.clone()
        optimizer_here.step()
        optimizer_there.step()
        if step % 7 == 0:  # between them, vectors are on their way
            optimizer_there.state_dict()
            for one, other in zip(here, there, strict=True):
                for name, tensor in one.state_dict().items():
                    assert torch.equal(other.state_dict()[name].to(device), tensor), (step, name)
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

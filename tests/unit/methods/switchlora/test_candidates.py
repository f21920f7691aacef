"""Candidates in buffers, on the host, or drawn: where they wait changes nothing else."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.small_llama import draw_model
from support.switchlora_layers import (
    build_optimizer,
    candidates_of,
    draw_few_at_a_time,
    effective_weight,
    relative_change,
    set_gradients,
)
from support.switchlora_reference import constant_candidates, splitmix64_outputs
from support.switchlora_runs import build_ours, run_step
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from switchtitan.distributed.fsdp import num_device_bytes
from switchtitan.distributed.random import draw_vectors, generator_for, splitmix32, splitmix64
from switchtitan.distributed.shards import empty_on_host_like, local, shard_buffer
from switchtitan.methods.lowrank import low_rank_layers
from switchtitan.methods.lowrank.linear import balanced_bounds
from switchtitan.methods.switchlora import SwitchLora, SwitchLoraConfig
from switchtitan.methods.switchlora.candidates import draw_of_widths
from switchtitan.optim import AdamWConfig

# (out, in, rank): wide, tall, and one whose only spare candidate is reused as soon as it returns
SHAPES = [(5, 7, 2), (23, 14, 9), (31, 64, 30), (64, 48, 13)]
SEED = 4


def build(shapes, dtype=torch.float32, device="cpu", num_per_step=1, **keys):
    """Layers of equal rank whose optimizer only switches: learning rate 0, gradients of zero."""
    rank = shapes[0][2]
    keys = {"interval": rank / num_per_step, "freeze_steps": 0, "decay": "constant", **keys}
    config = SwitchLoraConfig(rank=rank, **keys)
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
        layers[name] = layer if dtype == torch.float32 else layer.to(dtype)
        layer.to(device)
        for buffer in layer.host_buffers:
            setattr(layer, buffer, layer.get_buffer(buffer).cpu())
    layers_of = list(layers.values())
    candidates = candidates_of(method, layers)
    optimizer = build_optimizer(config, AdamWConfig(lr=1e-3), layers_of, 500, candidates)
    optimizer.set_lr(0.0)
    set_gradients(layers_of, 0.0)
    return layers_of, optimizer


WAYS = {
    "constant": {"candidates": "constant"},
    "constant-lora": {"candidates": "constant", "init": "lora"},
    "host": {"candidates_device": "host"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_switch_keeps_the_effective_weight_whatever_the_candidate(shape, way):
    for num_per_step in (1, 2) if shape[2] > 3 else (1,):
        (layer,), optimizer = build([shape], num_per_step=num_per_step, **WAYS[way])
        with torch.no_grad():  # with LoRA's zeros in B nothing would be folded
            layer.lora_b += 0.1
        for _ in range(15):
            before, factors = effective_weight(layer), layer.lora_a.clone()
            optimizer.step()
            # Each element rounds to 6e-8.
            assert relative_change(effective_weight(layer), before) <= 1e-7
            assert not torch.equal(layer.lora_a, factors)


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


def test_drawn_candidates_store_nothing_and_are_switched_like_stored_ones():
    keys = {"rank": 5, "interval": 6, "freeze_steps": 2, "decay": "constant"}
    states = []
    for candidates in ("swap", "constant"):
        model, optimizer = build_ours(SwitchLoraConfig(candidates=candidates, **keys))
        assert bool(list(model.buffers())) == (candidates == "swap")
        states.append([])
        for step in range(15):
            run_step(model, optimizer, step)
            counts = {
                name: tensor.clone()
                for name, tensor in optimizer.state_dict().items()
                if name.startswith("switch.")
            }
            states[-1].append((counts, optimizer.metrics()))
    swap, constant = states
    assert swap[-1][0]["switch.num_switched"].min() > 10
    for (counts, metrics), (other_counts, other_metrics) in zip(swap, constant, strict=True):
        assert counts.keys() == other_counts.keys()
        assert all(torch.equal(other_counts[name], tensor) for name, tensor in counts.items())
        assert metrics == other_metrics


def test_draws_follow_the_seed_and_differ_from_layer_to_layer():
    config = SwitchLoraConfig(rank=5, candidates="constant")
    model = draw_model(SwitchLora(config, 10, SEED))

    def initial_factors_of(seed):
        return {
            f"{name}.{factor}": tensor
            for name, layer in low_rank_layers(model).items()
            for factor, tensor in layer.initial_tensors(
                torch.zeros(layer.out_features, layer.in_features),
                lambda local_name, name=name: generator_for(seed, f"{name}.{local_name}"),
            ).items()
            if factor != "weight"
        }

    one, same, other = initial_factors_of(1), initial_factors_of(1), initial_factors_of(2)
    for name, factor in one.items():
        assert torch.equal(factor, same[name])
        assert not torch.isclose(factor, other[name]).any()
    for factor in ("lora_a", "lora_b"):
        of_both = (one[f"model.layers.{index}.mlp.up_proj.{factor}"] for index in (0, 1))
        assert not torch.isclose(*of_both).any()


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


def test_vectors_on_their_way_are_back_when_the_state_is_asked_for():
    (layer,), optimizer = build([(23, 14, 9)], candidates_device="host")
    layer.candidates_a[5] = 7.0
    outgoing = layer.lora_a[0].clone()
    optimizer.step()
    assert (layer.candidates_a[5] == 7).all(), "the host need not have waited for it"
    optimizer.state_dict()
    assert torch.equal(layer.candidates_a[5], outgoing), "slot (0 - 9) mod 14"


@pytest.fixture
def mesh():
    """Two replicas of two GPUs, without any; the meta device replaces a GPU."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    return init_device_mesh("cuda", (2, 2), mesh_dim_names=("replicate", "shard"))


def test_a_part_in_host_memory_belongs_to_the_mesh_and_takes_no_bytes_of_a_gpu(mesh):
    buffer = shard_buffer(torch.empty(5, 3, dtype=torch.bfloat16, device="meta"), mesh)
    on_host = empty_on_host_like(buffer)
    assert on_host.device_mesh == mesh
    assert on_host.placements == buffer.placements
    assert (tuple(on_host.shape), on_host.dtype) == ((5, 3), torch.bfloat16)
    assert local(on_host).device.type == on_host.detach().to_local().device.type == "cpu"
    assert tuple(local(on_host).shape) == (3, 3)
    tensors = [buffer, on_host, torch.empty(5)]
    assert num_device_bytes(tensors, torch.device("meta")) == 3 * 3 * 2
    assert num_device_bytes(tensors, torch.device("cpu")) == 3 * 3 * 2 + 5 * 4


def draw(name, slots=range(200), width=500, bound=1.0, seed=0):
    """The random vectors `name`, [slots, width]."""
    key = torch.tensor(generator_for(seed, name).initial_seed())
    return draw_vectors(key, torch.tensor(slots), width, bound)


def test_drawn_vectors_are_those_of_the_definition_in_any_part(monkeypatch):
    draw_few_at_a_time(monkeypatch, 3 * 31)
    expected = constant_candidates(5, "layer.lora_a", 7, 31, bound=0.3)
    for slots in (range(7), range(3), range(2, 7), [6, 0, 3]):
        found = draw("layer.lora_a", slots, 31, bound=0.3, seed=5)
        assert torch.equal(found, expected[slots])


def test_vectors_of_several_widths_are_those_of_each_width():
    key, slots = torch.tensor(17), torch.arange(4)
    bounds, widths = torch.tensor([0.5, 1.0, 0.0, 2.0]), np.array([7, 5, 5, 11])
    drawn = draw_of_widths(splitmix64(key, slots), bounds, widths, torch.device("cpu"))
    for index, vector in enumerate(drawn.split(widths.tolist())):
        alone = draw_vectors(key, slots[index, None], len(vector), float(bounds[index]))
        assert torch.equal(vector, alone[0])
        assert vector.abs().max() > 0 or bounds[index] == 0


def test_drawn_values_are_uniform_within_the_bound():
    values = draw("a", bound=0.37).flatten().double() / 0.37
    count = values.numel()
    assert -1 <= values.min() < -1 + 10 / count
    assert 1 - 10 / count < values.max() <= 1
    # Five standard errors: of the mean sqrt(1/3 / n), of chi^2 with 63 degrees of freedom.
    assert abs(values.mean().item()) < 5 * (1 / 3 / count) ** 0.5
    counts = torch.histc(values, bins=64, min=-1, max=1)
    chi_square = ((counts - count / 64) ** 2 / (count / 64)).sum().item()
    assert abs(chi_square - 63) < 5 * (2 * 63) ** 0.5


def test_drawn_neighbours_are_unrelated():
    """Elements, slots, A and B, layers and seeds: up to 100 000 pairs, five errors are 0.016."""
    values = draw("layers.0.lora_a")
    pairs = [
        (values, draw("layers.0.lora_b")),
        (values, draw("layers.1.lora_a")),
        (values, draw("layers.0.lora_a", seed=1)),
        *((values[:, :-lag], values[:, lag:]) for lag in (1, 2, 8)),
        *((values[:-lag], values[lag:]) for lag in (1, 2, 8)),
        (values[:-1, :-1], values[1:, 1:]),
    ]
    for first, second in pairs:
        both = torch.stack([first.flatten(), second.flatten()]).double()
        assert abs(torch.corrcoef(both)[0, 1].item()) < 0.016


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

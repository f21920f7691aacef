"""Candidates in host memory do not change training; bf16 ones change no layer's output."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from support.switchlora_layers import (
    build_optimizer,
    effective_weight,
    relative_change,
    set_gradients,
)
from support.tiny import full_tensors, tiny_config, tiny_trainer, train_steps
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from switchtitan.benchmark.estimate import estimate_step
from switchtitan.distributed.fsdp import num_device_bytes
from switchtitan.distributed.seeds import generator_for
from switchtitan.distributed.shards import empty_on_host_like, local, shard_buffer
from switchtitan.distributed.world import stop_world
from switchtitan.methods.lowrank import LowRankLinear
from switchtitan.methods.switchlora import SwitchLoraConfig
from switchtitan.methods.switchlora.candidates import StoredCandidates
from switchtitan.methods.switchlora.host_candidates import HostCandidates
from switchtitan.methods.switchlora.init import candidate_buffers, initial_factors
from switchtitan.methods.switchlora.optimizer import SwitchLoraOptimizer
from switchtitan.methods.switchlora.schedule import initial_slots
from switchtitan.optim import AdamWConfig

ON_HOST = ("--method.candidates_device", "host")
SHORT = ("--method.candidates_dtype", "bfloat16")
# (out, in, rank): wide, tall, and one whose only spare candidate is reused as soon as it returns
SHAPES = [(5, 7, 2), (23, 14, 9), (31, 64, 30), (64, 48, 13)]


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


def build(
    shapes: list[tuple[int, int, int]],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **keys: object,
) -> tuple[list[LowRankLinear], SwitchLoraOptimizer]:
    """Layers of equal rank whose optimizer only switches one vector of each in every step."""
    rank = shapes[0][2]
    config = SwitchLoraConfig(rank=rank, interval=rank, freeze_steps=0, decay="constant", **keys)
    layers = []
    for index, (out_features, in_features, _) in enumerate(shapes):
        buffers = candidate_buffers(config, out_features, in_features)
        layer = LowRankLinear(
            in_features, out_features, rank, 1 / rank, initial_factors(config), buffers=buffers
        )
        weight = torch.randn(out_features, in_features, generator=generator_for(index, "weight"))
        values = layer.initial_tensors(
            weight / in_features**0.5, lambda name, index=index: generator_for(index, name)
        )
        layer.load_state_dict(values)
        layers.append(layer if dtype == torch.float32 else layer.to(dtype))
        layer.to(device)
        for name in layer.host_buffers():
            setattr(layer, name, layer.get_buffer(name).cpu())
    candidates = (HostCandidates if config.candidates_device == "host" else StoredCandidates)(
        layers
    )
    optimizer = build_optimizer(config, AdamWConfig(lr=1e-3), layers, 500, candidates)
    optimizer.set_lr(0.0)
    set_gradients(layers, 0.0)
    return layers, optimizer


@pytest.mark.parametrize("device", ["device", "host"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_switch_to_a_rounded_candidate_keeps_the_effective_weight(shape, device):
    (layer,), optimizer = build([shape], candidates_dtype="bfloat16", candidates_device=device)
    for _ in range(40):
        before, factors = effective_weight(layer), layer.lora_a.clone()
        optimizer.step()
        # The fp32 bound: W absorbs the rounded candidate; the unrounded one differs by up to 4e-3.
        assert relative_change(effective_weight(layer), before) <= 1e-7
        assert not torch.equal(layer.lora_a, factors)


def test_what_waits_is_rounded_to_the_nearest_and_the_start_is_as_drawn():
    shape = (23, 14, 9)
    (exact,), _ = build([shape])
    (rounded,), optimizer = build([shape], candidates_dtype="bfloat16")
    for name in ("weight", "lora_a", "lora_b"):
        assert torch.equal(rounded.state_dict()[name], exact.state_dict()[name]), name
    slots_a, slots_b = initial_slots(9, 14)
    assert torch.equal(rounded.lora_a.bfloat16(), rounded.candidates_a[slots_a])
    assert torch.equal(rounded.lora_b.bfloat16(), rounded.candidates_b[slots_b])
    assert not torch.equal(rounded.lora_a, rounded.candidates_a[slots_a].float())
    first_of_a, fifth_of_b = rounded.lora_a[0].clone(), rounded.lora_b[4].clone()
    candidates = rounded.candidates_a[0].clone(), rounded.candidates_b[0].clone()
    optimizer.step()
    assert torch.equal(rounded.candidates_a[5], first_of_a.bfloat16()), "slot (0 - 9) mod 14"
    assert torch.equal(rounded.candidates_b[5], fifth_of_b.bfloat16())
    assert torch.equal(rounded.lora_a[0], candidates[0].float())
    assert torch.equal(rounded.lora_b[4], candidates[1].float())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_waiting_on_the_host_gives_the_same_bits(dtype, device):
    # Layers of equal rank: only the first one's spare candidates return at once.
    shapes = [(7, 6, 5), (6, 13, 5), (23, 17, 5)]
    here, optimizer_here = build(shapes, device=device, candidates_dtype=dtype)
    there, optimizer_there = build(
        shapes, device=device, candidates_dtype=dtype, candidates_device="host"
    )
    assert {one.lora_a.device.type for one in here + there} == {device}
    assert {buffer.device.type for layer in there for buffer in layer.buffers()} == {"cpu"}
    generator = torch.Generator().manual_seed(3)
    for step in range(60):
        for optimizer in (optimizer_here, optimizer_there):
            optimizer.set_lr(0.3)
        for one, other in zip(here, there, strict=True):
            for name in ("lora_a", "lora_b"):
                gradient = torch.randn(one.get_parameter(name).shape, generator=generator).to(
                    device
                )
                one.get_parameter(name).grad, other.get_parameter(name).grad = (
                    gradient,
                    gradient.clone(),
                )
        optimizer_here.step()
        optimizer_there.step()
        if step % 7 == 0:  # between them, vectors are on their way
            optimizer_there.state_dict()
            for one, other in zip(here, there, strict=True):
                for name, tensor in one.state_dict().items():
                    assert torch.equal(other.state_dict()[name].to(device), tensor), (step, name)
    assert optimizer_here.metrics()["switch/vectors_switched_total"] > 3 * 2 * 17, (
        "all have come back"
    )


def test_vectors_on_their_way_are_back_when_the_state_is_asked_for():
    (layer,), optimizer = build([(23, 14, 9)], candidates_device="host")
    layer.candidates_a[5] = 7.0
    outgoing = layer.lora_a[0].clone()
    optimizer.step()
    assert (layer.candidates_a[5] == 7).all(), "the host need not have waited for it"
    optimizer.state_dict()
    assert torch.equal(layer.candidates_a[5], outgoing), "slot (0 - 9) mod 14"


def test_loading_a_state_drops_what_was_fetched_for_another():
    (layer,), optimizer = build([(23, 14, 9)], candidates_device="host")
    optimizer.step()
    state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    with torch.no_grad():
        layer.candidates_a.fill_(7.0)
        layer.candidates_b.fill_(8.0)
    optimizer.load_state_dict(state)
    optimizer.step()
    assert (layer.lora_a[1] == 7).all()
    assert (layer.lora_b[5] == 8).all()


def run(folder, num_steps: int, *overrides: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer = tiny_trainer(folder, "switchlora", *overrides)
    losses = train_steps(trainer, num_steps)
    tensors = full_tensors(trainer)
    if trainer.stepper.state.step == 10:
        trainer.save()
        trainer.checkpointer.finish()
    trainer.stepper.close()
    return losses, tensors


def test_resuming_equals_a_straight_run_bitwise_wherever_candidates_wait(corpora):
    losses, straight = run(corpora / "host-straight", 20, *SHORT)
    folder = corpora / "host-resumed"
    first, _ = run(folder, 10, *ON_HOST, *SHORT)
    second, resumed = run(folder, 10, *ON_HOST, *SHORT)
    assert first + second == losses
    assert losses[-1] < losses[0]
    assert straight["optimizer.switch.num_switched"].min() > 14, "candidates have come back"
    for name, tensor in straight.items():
        assert torch.equal(resumed[name], tensor), name
        assert (tensor.dtype == torch.bfloat16) == (".candidates_" in name), name


def test_a_cpu_s_state_has_candidates_on_the_host_in_it_and_those_in_bfloat16_at_half(corpora):
    total, candidates = {}, {}
    for name, overrides in {"device": (), "host": ON_HOST, "short": SHORT}.items():
        trainer = tiny_trainer(corpora / f"state-{name}", "switchlora", *overrides)
        trainer.stepper.close()
        total[name] = num_device_bytes(trainer.tensors().values(), trainer.stepper.world.device)
        candidates[name] = sum(local(buffer).nbytes for buffer in trainer.stepper.model.buffers())
        stop_world()
    assert candidates["host"] == candidates["device"] == 2 * candidates["short"] > 0
    assert total["host"] == total["device"] == total["short"] + candidates["short"]


def test_bytes_on_another_device_leave_out_what_is_on_the_host():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh = init_device_mesh("cuda", (2,), mesh_dim_names=("shard",))
    buffer = shard_buffer(torch.empty(6, 3, dtype=torch.bfloat16, device="meta"), mesh)
    # The meta device replaces a GPU.
    tensors = [buffer, empty_on_host_like(buffer), torch.empty(5)]
    assert num_device_bytes(tensors, torch.device("meta")) == 3 * 3 * 2
    assert num_device_bytes(tensors, torch.device("cpu")) == 3 * 3 * 2 + 5 * 4


def test_estimates_count_candidates_on_the_host_apart(tmp_path):
    memory = {
        name: estimate_step(tiny_config(tmp_path, "switchlora", *overrides, num_ranks=2), 2).memory
        for name, overrides in {"device": (), "host": ON_HOST}.items()
    }
    candidates = memory["device"].most["buffers"]
    assert memory["device"].most["host"] == 0
    assert memory["host"].most["host"] == candidates > 0
    assert memory["host"].most["buffers"] == 0
    # The next step's candidates of 14 layers count as optimizer state: at most two vectors of A
    # and two of B per layer.
    fetched = memory["host"].most["optimizer"] - memory["device"].most["optimizer"]
    assert 0 < fetched <= 14 * 2 * 2 * 28 * 4
    assert memory["device"].state - memory["host"].state == candidates - fetched
    assert memory["host"].peak == sum(
        n for kind, n in memory["host"].at_peak.items() if kind != "host"
    )


def test_a_part_in_host_memory_belongs_to_a_mesh_of_gpus():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    mesh = init_device_mesh("cuda", (2, 2), mesh_dim_names=("replicate", "shard"))
    buffer = shard_buffer(torch.empty(5, 3, dtype=torch.bfloat16, device="meta"), mesh)
    on_host = empty_on_host_like(buffer)
    assert on_host.device_mesh == mesh
    assert on_host.placements == buffer.placements
    assert (tuple(on_host.shape), on_host.dtype) == ((5, 3), torch.bfloat16)
    assert local(on_host).device.type == on_host.detach().to_local().device.type == "cpu"
    assert tuple(local(on_host).shape) == (3, 3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("candidates_dtype", "float32"),
        ("candidates_dtype", "bfloat16"),
        ("candidates_device", "device"),
        ("candidates_device", "host"),
    ],
)
def test_constant_candidates_are_stored_nowhere_in_no_type(key, value):
    with pytest.raises(
        ValueError, match=f'{key} = {value!r} has no effect with candidates = "constant"'
    ):
        SwitchLoraConfig(rank=4, candidates="constant", **{key: value})

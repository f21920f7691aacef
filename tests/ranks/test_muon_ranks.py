"""Muon on several ranks: matrices reach their owners bitwise, updates equal those of one rank, and
a step takes two collectives."""

from pathlib import Path

import pytest
import torch
from support.optimizer_steps import draw, parameters
from support.ranks import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from switchtitan.contracts import TrainingOptimizer
from switchtitan.distributed.count_collectives import CountCommunication
from switchtitan.distributed.matrix_exchange import MatrixExchange
from switchtitan.distributed.replicas import check_replicas
from switchtitan.distributed.shards import copy_from_full_, local, shard_group
from switchtitan.optim import OPTIMIZERS, TrainedParameter
from switchtitan.optim.muon import MuonConfig
from switchtitan.optim.torch_optimizer import AdafactorConfig

# Over 2 and 4 ranks: even, uneven, and fewer rows than ranks. Two of one shape.
SHAPES = {
    "layers.0.even.weight": (8, 5),
    "layers.0.uneven.weight": (7, 9),
    "layers.1.uneven.weight": (7, 9),
    "layers.0.short.weight": (2, 6),
    "layers.0.tall.weight": (13, 3),
    "layers.0.norm.weight": (5,),
    "head.weight": (11, 5),
}
MATRICES = [name for name, shape in SHAPES.items() if len(shape) == 2 and "layers" in name]
NUM_STEPS, SAVED_STEP = 8, 3
MESHES = {"1": (1,), "2": (2,), "4": (4,), "2x2": (2, 2)}
"""Shards, or replicas and shards."""


def on_ranks(mesh_shape: tuple[int, ...]) -> DeviceMesh:
    names = ("replicate", "shard")[-len(mesh_shape) :]
    return init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)


def sharded(value: Tensor, mesh: DeviceMesh) -> DTensor:
    return distribute_tensor(value, mesh, [Replicate()] * (mesh.ndim - 1) + [Shard(0)])


def build(mesh: DeviceMesh, compute_dtype=torch.float32):
    named = {
        name: nn.Parameter(sharded(value.detach(), mesh))
        for name, value in parameters(SHAPES).items()
    }
    trained = [
        TrainedParameter(name, p, is_in_block="layers" in name, compute_dtype=compute_dtype)
        for name, p in named.items()
    ]
    config = MuonConfig(lr=0.02, weight_decay=0.1)
    return named, OPTIMIZERS.build(config, trained, False, 0)


def train(
    optimizer: TrainingOptimizer, named: dict[str, nn.Parameter], mesh: DeviceMesh, steps: range
) -> None:
    for step in steps:
        for parameter, grad in zip(named.values(), draw(SHAPES, step), strict=True):
            parameter.grad = sharded(grad, mesh)
        optimizer.step()
        optimizer.zero_grad()


def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in tensors.items()
    }


def run_straight(rank: int, folder: Path, mesh_name: str) -> None:
    mesh = on_ranks(MESHES[mesh_name])
    named, optimizer = build(mesh)
    train(optimizer, named, mesh, range(SAVED_STEP))
    saved = full(named) | full(optimizer.state_dict())
    train(optimizer, named, mesh, range(SAVED_STEP, NUM_STEPS))
    check_replicas(named | optimizer.state_dict(), torch.device("cpu"))
    results = {"saved": saved, "end": full(named) | full(optimizer.state_dict())}
    if rank == 0:
        torch.save(results, folder / f"{mesh_name}.pt")


def run_resumed(rank: int, folder: Path, from_mesh: str, mesh_name: str) -> None:
    saved = torch.load(folder / f"{from_mesh}.pt")["saved"]
    mesh = on_ranks(MESHES[mesh_name])
    named, optimizer = build(mesh)
    for name, parameter in named.items():
        copy_from_full_(parameter, saved[name])
    state = optimizer.state_dict()
    for key, tensor in state.items():
        if isinstance(tensor, DTensor):
            copy_from_full_(tensor, saved[key])
        else:
            tensor.copy_(saved[key])
    optimizer.load_state_dict(state)
    train(optimizer, named, mesh, range(SAVED_STEP, NUM_STEPS))
    end = full(named) | full(optimizer.state_dict())
    if rank == 0:
        torch.save(end, folder / f"{from_mesh}-{mesh_name}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("muon")
    for name, shape in MESHES.items():
        num_ranks = shape[0] * shape[-1] if len(shape) > 1 else shape[0]
        run_on_ranks(num_ranks, run_straight, folder, name)
    return folder


@pytest.mark.parametrize("mesh", ["2", "4", "2x2"])
def test_ranks_train_as_one(folder, mesh):
    one, several = (torch.load(folder / f"{name}.pt")["end"] for name in ("1", mesh))
    start = parameters(SHAPES)
    assert one.keys() == several.keys()
    for name, expected in one.items():
        # Batches of another size may be multiplied in another order, in fp32.
        torch.testing.assert_close(several[name], expected, rtol=1e-5, atol=1e-5)
        if name in start:
            assert (expected - start[name]).abs().max() > 1e-2, name


@pytest.mark.parametrize(("saved_on", "resumed_on"), [("2", "2"), ("2", "4"), ("4", "1")])
def test_a_save_resumes_bitwise_on_as_many_ranks_and_also_on_others(folder, saved_on, resumed_on):
    run_on_ranks(MESHES[resumed_on][0], run_resumed, folder, saved_on, resumed_on)
    expected = torch.load(folder / f"{saved_on}.pt")["end"]
    resumed = torch.load(folder / f"{saved_on}-{resumed_on}.pt")
    for name, value in expected.items():
        if saved_on == resumed_on:
            assert torch.equal(resumed[name], value), name
        else:
            torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-5)


def exchange_both_ways(rank: int, mesh_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    mesh = on_ranks(mesh_shape)
    values = [
        torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(n)).to(dtype)
        for n, name in enumerate(MATRICES)
    ]
    matrices = [sharded(value, mesh) for value in values]
    exchange = MatrixExchange(matrices, [float(value.numel()) for value in values], dtype)
    batches = exchange.collect([local(matrix) for matrix in matrices])
    owned = [matrix for batch in batches for matrix in batch]
    for matrix in owned:
        assert sum(matrix.shape == value.shape and torch.equal(matrix, value) for value in values)
    group = shard_group(matrices[0])
    num_owned = torch.tensor(len(owned))
    torch.distributed.all_reduce(num_owned, group=group)
    assert num_owned == len(values)
    parts = exchange.distribute([2 * batch for batch in batches])
    for part, matrix in zip(parts, matrices, strict=True):
        assert torch.equal(part, 2 * local(matrix))


@pytest.mark.parametrize(
    ("mesh_shape", "dtype"),
    # Of 8 ranks, some own none.
    [((2,), torch.float32), ((4,), torch.bfloat16), ((2, 2), torch.float32), ((8,), torch.float32)],
)
def test_full_matrices_reach_one_owner_each_and_their_rows_come_back(mesh_shape, dtype):
    num_ranks = mesh_shape[0] * (mesh_shape[1] if len(mesh_shape) > 1 else 1)
    run_on_ranks(num_ranks, exchange_both_ways, mesh_shape, dtype)


def count_collectives(rank: int) -> None:
    mesh = on_ranks((2,))
    for dtype in (torch.float32, torch.bfloat16):
        named, optimizer = build(mesh, dtype)
        for parameter, grad in zip(named.values(), draw(SHAPES, 0), strict=True):
            parameter.grad = sharded(grad, mesh)
        for _ in range(2):
            with CountCommunication() as counter:
                optimizer.step()
            counts = {kind: count for kind, count in counter.counts.items() if count.num_calls}
            assert counts.keys() == {"all_to_all"}
            assert counts["all_to_all"].num_calls == 2
    # Shows that the check above can fail: gathering every parameter and gradient.
    trained = [TrainedParameter(name, parameter) for name, parameter in named.items()]
    one_by_one = OPTIMIZERS.build(AdafactorConfig(lr=0.02), trained, False, 0)
    with CountCommunication() as counter:
        one_by_one.step()
    assert counter.counts["all_to_all"].num_calls == 0
    assert counter.counts["all_gather"].num_calls == 2 * len(SHAPES)


def test_a_step_takes_two_collectives():
    run_on_ranks(2, count_collectives)


def count_bytes(rank: int) -> None:
    mesh = on_ranks((2,))
    for dtype in (torch.float32, torch.bfloat16):
        named, optimizer = build(mesh, dtype)
        for parameter, grad in zip(named.values(), draw(SHAPES, 0), strict=True):
            parameter.grad = sharded(grad, mesh)
        with CountCommunication() as counter:
            optimizer.step()
        sent = torch.tensor(counter.counts["all_to_all"].bytes_sent)
        torch.distributed.all_reduce(sent)
        # Half of its rows each way, those that pad uneven shards included.
        rows = sum(-(-SHAPES[name][0] // 2) * SHAPES[name][1] for name in MATRICES)
        assert sent == 2 * 2 * rows * dtype.itemsize / 2


def test_a_rank_sends_its_shards_both_ways_in_the_compute_dtype():
    run_on_ranks(2, count_bytes)

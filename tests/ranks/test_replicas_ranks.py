"""Differing replicas are detected in every layout and raised on all ranks."""

import pytest
import torch
from support.ranks import run_on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from switchtitan.distributed.replicas import check_replicas
from switchtitan.distributed.shards import local
from switchtitan.errors import RanksDisagreeError

CPU = torch.device("cpu")


def change(tensor: Tensor) -> None:
    """Changes one bit."""
    flat = local(tensor).view(-1)
    flat[0] = -flat[0]


def check_two_by_two(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    placements = [Replicate(), Shard(0)]
    tensors = {
        "full": values.clone(),
        "number": torch.tensor(7),
        "split": distribute_tensor(values, mesh, placements),
        "vector": distribute_tensor(values[:, 0].contiguous(), mesh, placements),
        # The second shard has no row.
        "short": distribute_tensor(values[:1].to(torch.bfloat16), mesh, placements),
        "bytes": distribute_tensor((10 * values).to(torch.int8) | 1, mesh, placements),
    }
    check_replicas(tensors, CPU)
    for name, changed_ranks, named in (
        ("full", [1], "rank 1 against ranks 0, 2, 3"),
        ("full", [0, 2], "ranks 0, 2 against ranks 1, 3"),
        ("number", [3], "rank 3 against ranks 0, 1, 2"),
        ("split", [2], "rank 0 against rank 2"),
        ("vector", [3], "rank 1 against rank 3"),
        ("short", [0], "rank 0 against rank 2"),
        ("bytes", [2], "rank 0 against rank 2"),
    ):
        if rank in changed_ranks:
            change(tensors[name])
        with pytest.raises(RanksDisagreeError, match=rf"\({name}: {named}\)"):
            check_replicas(tensors, CPU)
        if rank in changed_ranks:
            change(tensors[name])
        check_replicas(tensors, CPU)
    # Equal on both replicas.
    if rank in (1, 3):
        change(tensors["split"])
    check_replicas(tensors, CPU)


def check_shards_alone(rank: int) -> None:
    mesh = init_device_mesh("cpu", (4,))
    parts = distribute_tensor(torch.zeros(8, 3), mesh, [Shard(0)])
    local(parts).fill_(rank)
    check_replicas({"parts": parts}, CPU)


def check_all(rank: int) -> None:
    check_two_by_two(rank)
    check_shards_alone(rank)


def test_differing_replicas_are_detected():
    run_on_ranks(4, check_all)

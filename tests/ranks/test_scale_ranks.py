"""SCALE on several ranks equals one rank, with one collective a step."""

from math import prod

import pytest
import torch
from support.ranks import run_on_ranks
from support.scale_parameters import give_gradients, start, trained
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from switchtitan.distributed.replicas import check_replicas
from switchtitan.optim import OPTIMIZERS
from switchtitan.optim.scale import ScaleConfig

CONFIG = ScaleConfig(lr=0.03, other_lr=0.007, weight_decay=0.2, momentum=0.8)
NUM_STEPS = 8


def compare_with_one_rank(rank: int, mesh_shape: tuple[int, ...]) -> None:
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    named, split = start(), start(mesh)
    optimizer = OPTIMIZERS.build(CONFIG, trained(named), False, 0)
    split_optimizer = OPTIMIZERS.build(CONFIG, trained(split), False, 0)
    for step in range(NUM_STEPS):
        give_gradients(named, step)
        give_gradients(split, step, mesh)
        with CommDebugMode() as alone:
            optimizer.step()
        with CommDebugMode() as together:
            split_optimizer.step()
        assert alone.get_total_counts() == 0
        assert together.get_total_counts() == 1
        for name, parameter in split.items():
            # Sums over ranks have another order: 6e-8 a step.
            torch.testing.assert_close(
                parameter.full_tensor(), named[name], rtol=2e-6, atol=2e-6, msg=f"{name} {step}"
            )

    check_replicas(split | split_optimizer.state_dict(), torch.device("cpu"))


@pytest.mark.parametrize("mesh_shape", [(2,), (4,), (2, 2)], ids=["2", "4", "2x2"])
def test_updates_are_equal_on_any_number_of_ranks_with_one_collective(mesh_shape):
    """On four shards, one rank holds no row of three, five, six or nine."""
    run_on_ranks(prod(mesh_shape), compare_with_one_rank, mesh_shape)

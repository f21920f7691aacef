"""SCALE on several ranks equals one rank, with one collective a step."""

import pytest
import torch
from support.ranks import run_on_ranks
from support.scale_parameters import give_gradients, start, trained
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from switchtitan.optim import OPTIMIZERS
from switchtitan.optim.scale import ScaleConfig

CONFIG = ScaleConfig(lr=0.03, other_lr=0.007, weight_decay=0.2, momentum=0.8)
NUM_STEPS = 8


def compare_with_one_rank(rank: int, num_ranks: int) -> None:
    mesh = init_device_mesh("cpu", (num_ranks,))
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


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_updates_are_equal_on_any_number_of_ranks_with_one_collective(num_ranks):
    """On four ranks, one rank holds no row of three, five, six or nine."""
    run_on_ranks(num_ranks, compare_with_one_rank, num_ranks)

"""GaLore and APOLLO on several ranks equal one rank, with few collectives."""

from math import sqrt

import pytest
import torch
from support.projected_models import RANK, TARGETS, draw_gradients, draw_model, give_gradients
from support.ranks import run_on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from switchtitan.contracts import MethodConfig, TrainingOptimizer
from switchtitan.methods import METHODS
from switchtitan.methods.apollo import ApolloConfig
from switchtitan.methods.galore import GaloreConfig
from switchtitan.optim import AdamWConfig

NUM_STEPS = 10
INTERVAL = 4
CONFIGS: dict[str, MethodConfig] = {
    "galore": GaloreConfig(rank=RANK, update_interval=INTERVAL, targets=TARGETS),
    "apollo": ApolloConfig(rank=RANK, update_interval=INTERVAL, targets=TARGETS),
    "apollo_mini": ApolloConfig(
        rank=1, update_interval=INTERVAL, targets=TARGETS, scaling="tensor", scale=sqrt(7)
    ),
}
COLLECTIVES_BETWEEN_REFRESHES = {"galore": 2, "apollo": 2, "apollo_mini": 2}
ADAM = AdamWConfig(lr=0.03, betas=(0.8, 0.97), weight_decay=0.1, decay_norms=True)


def build(config: MethodConfig, model: torch.nn.Module) -> TrainingOptimizer:
    return METHODS.build(config, NUM_STEPS, 3).build_optimizer(model, ADAM, False)


def compare_with_one_rank(rank: int, num_ranks: int) -> None:
    mesh = init_device_mesh("cpu", (num_ranks,))
    for name, config in CONFIGS.items():
        model, split_model = draw_model(), draw_model(mesh=mesh)
        optimizer, split_optimizer = build(config, model), build(config, split_model)
        for step, gradients in enumerate(draw_gradients(NUM_STEPS)):
            give_gradients(model, gradients)
            give_gradients(split_model, gradients, mesh)
            with CommDebugMode() as alone:
                optimizer.step()
            with CommDebugMode() as together:
                split_optimizer.step()
            assert alone.get_total_counts() == 0
            if step % INTERVAL:
                assert together.get_total_counts() == COLLECTIVES_BETWEEN_REFRESHES[name], name
            for key, parameter in split_model.named_parameters():
                # Equal gradients give equal bases; sums over ranks have another order: 6e-8 a step.
                torch.testing.assert_close(
                    parameter.full_tensor(),
                    model.get_parameter(key),
                    rtol=2e-6,
                    atol=2e-6,
                    msg=f"{name} {key} {step}",
                )
        full = {
            key: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            for key, tensor in split_optimizer.state_dict().items()
        }
        for key, tensor in optimizer.state_dict().items():
            torch.testing.assert_close(full[key], tensor, rtol=1e-5, atol=1e-6, msg=f"{name} {key}")


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_updates_are_equal_on_any_number_of_ranks_with_two_collectives(num_ranks):
    """On four ranks, one rank holds no row of five, and none of a rank of three."""
    run_on_ranks(num_ranks, compare_with_one_rank, num_ranks)

"""GaLore, Fira and APOLLO on several ranks equal one rank, with few collectives."""

from math import sqrt

import pytest
import torch
from support.projected_models import RANK, TARGETS, draw_gradients, draw_model, give_gradients
from support.ranks import run_on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from switchtitan.contracts import MethodConfig, TrainingOptimizer
from switchtitan.distributed.replicas import check_replicas
from switchtitan.methods import METHODS
from switchtitan.methods.apollo import ApolloConfig
from switchtitan.methods.fira import FiraConfig
from switchtitan.methods.galore import GaloreConfig
from switchtitan.methods.projected import singular_bases
from switchtitan.methods.projected.singular_bases import leading_singular_vectors
from switchtitan.optim import AdamWConfig

NUM_STEPS = 10
INTERVAL = 4
CONFIGS: dict[str, MethodConfig] = {
    "galore": GaloreConfig(rank=RANK, update_interval=INTERVAL, targets=TARGETS),
    "fira": FiraConfig(rank=RANK, update_interval=INTERVAL, targets=TARGETS),
    "apollo": ApolloConfig(rank=RANK, update_interval=INTERVAL, targets=TARGETS),
    "apollo_mini": ApolloConfig(
        rank=1, update_interval=INTERVAL, targets=TARGETS, scaling="tensor", scale=sqrt(7)
    ),
}
COLLECTIVES_BETWEEN_REFRESHES = {"galore": 2, "fira": 3, "apollo": 2, "apollo_mini": 2}
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


def perturbed(grad: Tensor, rank: int) -> Tensor:
    """What a device that rounds differently would compute."""
    return leading_singular_vectors(grad, rank) + 1e-3


def check_bases_of_replicas(
    rank: int, layout: tuple[int, int], has_perturbed_replica: bool
) -> None:
    mesh = init_device_mesh("cpu", layout, mesh_dim_names=("replicate", "shard"))
    model = draw_model(mesh=mesh)
    optimizer = build(CONFIGS["galore"], model)
    if has_perturbed_replica and mesh.get_local_rank(0) == 1:
        singular_bases.leading_singular_vectors = perturbed
    give_gradients(model, next(draw_gradients(1)), mesh)
    optimizer.step()
    # Raises if a bit of a weight, a moment or a basis differs between replicas.
    state = optimizer.state_dict() | dict(model.named_parameters())
    matrices = {name: tensor for name, tensor in state.items() if tensor.ndim == 2}
    check_replicas(matrices, torch.device("cpu"))
    own = {name: value for name, value in optimizer.state_dict().items() if "basis" in name}
    assert len(own) == len(TARGETS)
    alone = draw_model()
    optimizer_alone = build(CONFIGS["galore"], alone)
    give_gradients(alone, next(draw_gradients(1)))
    optimizer_alone.step()
    expected = optimizer_alone.state_dict()
    for name, basis in own.items():
        full = basis.full_tensor() if hasattr(basis, "full_tensor") else basis
        tolerance = 2e-3 if has_perturbed_replica else 1e-6
        torch.testing.assert_close(full, expected[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("layout", [(2, 2), (4, 1)])
def test_replicas_have_the_same_bases_although_their_devices_round_differently(layout):
    for has_perturbed_replica in (False, True):
        run_on_ranks(4, check_bases_of_replicas, layout, has_perturbed_replica)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_updates_are_equal_on_any_number_of_ranks_with_few_collectives(num_ranks):
    """On four ranks, one rank holds no row of five, and none of a rank of three."""
    run_on_ranks(num_ranks, compare_with_one_rank, num_ranks)

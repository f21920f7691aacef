"""Fira equals a plain reading of its algorithm and the authors' package."""

from typing import Any

import pytest
import torch
from support.packages import needs_fira
from support.projected_models import (
    ADAM,
    NUM_STEPS,
    RANK,
    TARGETS,
    OddModel,
    draw_gradients,
    draw_model,
    give_gradients,
    steps_next_to_adamw,
)
from torch import Tensor

from switchtitan.contracts import TrainingOptimizer
from switchtitan.methods.fira import Fira, FiraConfig
from switchtitan.optim import AdamWConfig

CONFIG = FiraConfig(rank=RANK, update_interval=4, targets=TARGETS, scale=0.6, max_norm_growth=1.3)
# An eps that matters, so that where it is added shows.
NO_DECAY = AdamWConfig(lr=0.03, betas=(0.8, 0.97), eps=1e-2)


def build(
    model: OddModel,
    config: FiraConfig = CONFIG,
    adam: AdamWConfig = ADAM,
    compile_step: bool = False,
) -> TrainingOptimizer:
    return Fira(config, NUM_STEPS, seed=1).build_optimizer(model, adam, compile_step)


class Reference:
    """Fira for one weight in float64, projected on the left: tall and square ones are transposed.

    Args:
        subtracted: what the residual lacks of the projected gradient; by default all of
            `CONFIG.scale`.
    """

    def __init__(self, weight: Tensor, subtracted: float = CONFIG.scale) -> None:
        self.weight = weight.detach().double().clone()
        self.subtracted = subtracted
        self.mean = self.mean_square = torch.zeros((), dtype=torch.float64)
        self.num_steps = 0
        self.last_norm: Tensor | None = None
        self.was_limited = False

    def step(self, grad: Tensor, lr: float) -> None:
        is_turned = grad.shape[0] >= grad.shape[1]
        grad = (grad.T if is_turned else grad).double()
        if self.num_steps % CONFIG.update_interval == 0:
            columns = torch.linalg.svd(grad).U[:, :RANK]
            # The paper leaves signs open.
            signs = [1 if column[column.abs().argmax()] > 0 else -1 for column in columns.T]
            self.basis = columns * torch.tensor(signs)
        projected = self.basis.T @ grad
        self.num_steps += 1
        beta1, beta2 = ADAM.betas
        self.mean = beta1 * self.mean + (1 - beta1) * projected
        self.mean_square = beta2 * self.mean_square + (1 - beta2) * projected**2
        normalized = self.mean / (self.mean_square**0.5 + ADAM.eps)
        scaling = torch.stack(
            [
                normalized[:, column].norm() / projected[:, column].norm()
                for column in range(grad.shape[1])
            ]
        )
        residual = (grad - self.subtracted * self.basis @ projected) @ torch.diag(scaling)
        norm = residual.norm()
        self.was_limited = self.last_norm is not None and bool(
            norm > CONFIG.max_norm_growth * self.last_norm
        )
        if self.was_limited:
            residual = residual / norm * CONFIG.max_norm_growth * self.last_norm
        self.last_norm = residual.norm()
        update = CONFIG.scale * self.basis @ normalized + residual
        correction = (1 - beta2**self.num_steps) ** 0.5 / (1 - beta1**self.num_steps)
        self.weight -= lr * ADAM.weight_decay * self.weight
        self.weight -= lr * correction * (update.T if is_turned else update)


@pytest.mark.parametrize("compile_step", [False, True])
def test_every_orientation_equals_the_reference_in_every_step(compile_step):
    torch._dynamo.reset()
    model = draw_model()
    optimizer = build(model, compile_step=compile_step)
    references = {name: Reference(model.get_parameter(f"{name}.weight")) for name in TARGETS}
    num_limited = 0
    for gradients, lr in steps_next_to_adamw(model, optimizer):
        for name, reference in references.items():
            reference.step(gradients[f"{name}.weight"], lr)
            # Values of order 1, each step rounded at 6e-8.
            torch.testing.assert_close(
                model.get_parameter(f"{name}.weight").double(),
                reference.weight,
                rtol=2e-6,
                atol=2e-6,
            )
        now_limited = sum(reference.was_limited for reference in references.values())
        assert optimizer.metrics()["projection/limited_share"] == pytest.approx(
            now_limited / len(TARGETS)
        )
        num_limited += now_limited
    # The limiter was at work, and not always.
    assert 0.1 < num_limited / (NUM_STEPS * len(TARGETS)) < 0.9
    assert optimizer.metrics()["projection/refreshes"] == 6


def test_a_residual_without_any_of_the_projection_is_another_update():
    """What the paper writes, with a scale that is not 1: the comparison above would find it."""
    model = draw_model()
    optimizer = build(model)
    papers = {
        name: Reference(model.get_parameter(f"{name}.weight"), subtracted=1.0) for name in TARGETS
    }
    gradients = next(draw_gradients(1))
    give_gradients(model, gradients)
    optimizer.step()
    for name, reference in papers.items():
        reference.step(gradients[f"{name}.weight"], ADAM.lr)
        difference = model.get_parameter(f"{name}.weight") - reference.weight
        assert difference.abs().max() > 1e-3, name


def package_optimizer(model: OddModel, config: FiraConfig) -> torch.optim.Optimizer:
    """The authors' optimizer, for the weights in `TARGETS`; its limit of growth is fixed."""
    import fira

    return fira.FiraAdamW(
        [
            {
                "params": [model.get_parameter(f"{name}.weight") for name in TARGETS],
                "rank": config.rank,
                "update_proj_gap": config.update_interval,
                "alpha": config.scale,
                "proj_type": "std",
            }
        ],
        lr=NO_DECAY.lr,
        betas=NO_DECAY.betas,
        eps=NO_DECAY.eps,
        no_deprecation_warning=True,
    )


@pytest.fixture
def package_with_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the largest entry of each of the package's singular vectors positive, as ours is.

    The package keeps moments when a sign changes, so its results depend on the decomposition.
    """
    from fira.gradient_projection import GradientProjector

    decompose = GradientProjector.get_orthogonal_matrix

    def signed(self: Any, weights: Tensor, rank: int, type: str) -> Tensor:
        vectors = decompose(self, weights, rank, type)
        rows = vectors if type == "right" else vectors.T
        rows = rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
        return rows if type == "right" else rows.T

    monkeypatch.setattr(GradientProjector, "get_orthogonal_matrix", signed)


@needs_fira
@pytest.mark.usefixtures("package_with_signs")
@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_weights_equal_those_of_the_authors_package(scale):
    config = FiraConfig(rank=RANK, update_interval=4, targets=TARGETS, scale=scale)
    model, theirs = draw_model(), draw_model()
    optimizer, package = build(model, config, NO_DECAY), package_optimizer(theirs, config)
    for gradients in draw_gradients(10):
        give_gradients(model, gradients)
        give_gradients(theirs, gradients)
        optimizer.step()
        package.step()
        for name in TARGETS:
            # The package decomposes in fp32, with errors of about 1e-6 in its bases.
            torch.testing.assert_close(
                model.get_parameter(f"{name}.weight"),
                theirs.get_parameter(f"{name}.weight"),
                rtol=1e-5,
                atol=1e-5,
            )
    without_limit = draw_model()
    unlimited = build(without_limit, config.model_copy(update={"max_norm_growth": 1e9}), NO_DECAY)
    for gradients in draw_gradients(10):
        give_gradients(without_limit, gradients)
        unlimited.step()
    assert any(
        (without_limit.get_parameter(f"{name}.weight") - theirs.get_parameter(f"{name}.weight"))
        .abs()
        .max()
        > 1e-2
        for name in TARGETS
    )


def test_a_step_moves_weights_in_all_directions():
    """GaLore's steps have the rank of the projection."""
    model = draw_model(torch.float64)
    before = {name: model.get_parameter(f"{name}.weight").detach().clone() for name in TARGETS}
    optimizer = build(model, adam=NO_DECAY)
    give_gradients(model, next(draw_gradients(1, torch.float64)))
    optimizer.step()
    for name in TARGETS:
        change = model.get_parameter(f"{name}.weight") - before[name]
        assert torch.linalg.matrix_rank(change, rtol=1e-9) == min(change.shape), name


def test_state_has_low_rank_moments_bases_and_the_norms_of_the_limiter():
    shapes = {
        name: tuple(tensor.shape) for name, tensor in build(draw_model()).state_dict().items()
    }
    assert shapes["up_proj.weight.exp_avg"] == (7, RANK)
    assert shapes["down_proj.weight.exp_avg"] == (RANK, 9)
    assert shapes["up_proj.weight.basis"] == shapes["down_proj.weight.basis"] == (5, RANK)
    assert shapes["projection.update_norms"] == (len(TARGETS),)


def test_gradients_are_left_as_they_were():
    model = draw_model()
    gradients = next(draw_gradients(1))
    give_gradients(model, gradients)
    build(model).step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradients[name]), name

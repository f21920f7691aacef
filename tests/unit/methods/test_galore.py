"""GaLore equals a plain reading of its algorithm, and its bases are those of the gradients."""

import pytest
import torch
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
from switchtitan.errors import ConfigError
from switchtitan.methods.galore import Galore, GaloreConfig
from switchtitan.methods.projected.singular_bases import leading_singular_vectors

CONFIG = GaloreConfig(rank=RANK, update_interval=4, targets=TARGETS, scale=0.6)
# An eps that matters, so that where it is added shows.


def build(model: OddModel, compile_step: bool = False) -> TrainingOptimizer:
    return Galore(CONFIG, NUM_STEPS, seed=1).build_optimizer(model, ADAM, compile_step)


class Reference:
    """GaLore for one weight: Algorithm 2 with the authors' order of eps and bias correction."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach().clone()
        self.mean = self.mean_square = torch.zeros(())
        self.num_steps = 0

    def step(self, grad: Tensor, lr: float) -> None:
        num_rows, num_columns = grad.shape
        if self.num_steps % CONFIG.update_interval == 0:
            u, _, vh = torch.linalg.svd(grad, full_matrices=False)
            columns = vh[:RANK].T if num_rows >= num_columns else u[:, :RANK]
            # The paper leaves signs open.
            signs = [1 if column[column.abs().argmax()] > 0 else -1 for column in columns.T]
            self.basis = columns * torch.tensor(signs)
        projected = grad @ self.basis if num_rows >= num_columns else self.basis.T @ grad
        self.num_steps += 1
        beta1, beta2 = ADAM.betas
        self.mean = beta1 * self.mean + (1 - beta1) * projected
        self.mean_square = beta2 * self.mean_square + (1 - beta2) * projected**2
        normalized = self.mean / (self.mean_square**0.5 + ADAM.eps)
        correction = (1 - beta2**self.num_steps) ** 0.5 / (1 - beta1**self.num_steps)
        back = normalized @ self.basis.T if num_rows >= num_columns else self.basis @ normalized
        self.weight -= lr * ADAM.weight_decay * self.weight
        self.weight -= lr * correction * CONFIG.scale * back


@pytest.mark.parametrize("compile_step", [False, True])
def test_every_orientation_equals_the_reference_in_every_step(compile_step):
    torch._dynamo.reset()
    model = draw_model()
    optimizer = build(model, compile_step)
    references = {name: Reference(model.get_parameter(f"{name}.weight")) for name in TARGETS}
    for gradients, lr in steps_next_to_adamw(model, optimizer):
        for name, reference in references.items():
            reference.step(gradients[f"{name}.weight"], lr)
            # Values of order 1, each step rounded at 6e-8.
            torch.testing.assert_close(
                model.get_parameter(f"{name}.weight"), reference.weight, rtol=1e-6, atol=1e-6
            )
    assert optimizer.metrics() == {"optimizer/lr": ADAM.lr, "projection/refreshes": 6.0}


def test_a_step_moves_weights_within_the_leading_directions_alone():
    model = draw_model(torch.float64)
    before = {name: model.get_parameter(f"{name}.weight").detach().clone() for name in TARGETS}
    optimizer = Galore(CONFIG, NUM_STEPS, seed=1).build_optimizer(
        model, ADAM.model_copy(update={"weight_decay": 0.0}), False
    )
    for gradients in draw_gradients(3, torch.float64):
        give_gradients(model, gradients)
        optimizer.step()
    for name in TARGETS:
        change = model.get_parameter(f"{name}.weight") - before[name]
        # Differences of float64 values of order 1 against changes of order 0.01.
        assert torch.linalg.matrix_rank(change, rtol=1e-9) == RANK, name


def test_moments_are_kept_for_the_projection_alone_and_bases_are_saved():
    model = draw_model()
    shapes = {name: tuple(tensor.shape) for name, tensor in build(model).state_dict().items()}
    assert shapes["q_proj.weight.exp_avg"] == shapes["q_proj.weight.exp_avg_sq"] == (5, RANK)
    assert shapes["up_proj.weight.exp_avg"] == (7, RANK)
    assert shapes["down_proj.weight.exp_avg"] == (RANK, 9)
    assert shapes["up_proj.weight.basis"] == shapes["down_proj.weight.basis"] == (5, RANK)
    assert shapes["up_proj.bias.exp_avg"] == (7,)


@pytest.mark.parametrize("shape", [(7, 5), (5, 5), (5, 9)])
def test_singular_vectors_are_orthonormal_and_their_signs_do_not_depend_on_the_gradient_s(shape):
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    vectors = leading_singular_vectors(grad, RANK)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(RANK, dtype=torch.float64))
    torch.testing.assert_close(leading_singular_vectors(-grad, RANK), vectors)
    projected = grad @ vectors if shape[0] >= shape[1] else grad.T @ vectors
    torch.testing.assert_close(projected.norm(dim=0), torch.linalg.svdvals(grad)[:RANK])


def largest_sine(first: Tensor, second: Tensor) -> float:
    """Of the principal angles between the spans of orthonormal columns, in float64."""
    first, second = (torch.linalg.qr(columns.double()).Q for columns in (first, second))
    return torch.linalg.matrix_norm(second - first @ (first.T @ second), ord=2).item()


@pytest.mark.parametrize("shape", [(90, 60), (60, 90)])
def test_the_subspace_is_at_least_as_exact_as_that_of_an_svd_in_fp32(shape):
    """Singular values fall from 1 to 1e-6: in fp32, the Gram matrix would lose those below 3e-4."""
    generator = torch.Generator().manual_seed(3)
    left, _, right = torch.linalg.svd(
        torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False
    )
    values = torch.logspace(0, -6, 60, dtype=torch.float64)
    grad = (left * values @ right).float()
    rank = 30
    exact_left, _, exact_right = torch.linalg.svd(grad.double(), full_matrices=False)
    rounded_left, _, rounded_right = torch.linalg.svd(grad, full_matrices=False)
    is_tall = shape[0] > shape[1]
    exact = (exact_right.T if is_tall else exact_left)[:, :rank]
    rounded = (rounded_right.T if is_tall else rounded_left)[:, :rank]
    ours = leading_singular_vectors(grad, rank)
    assert ours.dtype == torch.float32
    error, error_of_svd = largest_sine(exact, ours), largest_sine(exact, rounded)
    # Rounded to fp32 once, at 6e-8 per entry.
    assert error < 1e-6
    assert error <= error_of_svd + 1e-6
    gram = grad.T @ grad if is_tall else grad @ grad.T
    in_fp32 = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
    assert largest_sine(exact, in_fp32) > 100 * error


def test_a_gradient_that_is_not_finite_is_left_for_the_trainer_to_report():
    model = draw_model()
    optimizer = build(model)
    gradients = next(draw_gradients(1))
    gradients["q_proj.weight"][1, 2] = torch.nan
    give_gradients(model, gradients)
    optimizer.step()
    assert model.q_proj.weight.isnan().any()


def test_a_target_without_a_layer_and_a_rank_without_room_are_refused():
    config = GaloreConfig(rank=RANK, targets=("q_proj", "k_proj"))
    with pytest.raises(
        ConfigError, match=r"targets = .*no linear layer called 'k_proj'; it has down_proj, lm_head"
    ):
        Galore(config, NUM_STEPS, seed=1).build_optimizer(draw_model(), ADAM, False)
    shapes = {"layers.0.q_proj": (5, 5), "layers.0.down_proj": (5, 9)}
    problems = GaloreConfig(rank=5, targets=("q_proj", "down_proj")).check_model(shapes)
    assert len(problems) == 1
    assert "rank = 5" in problems[0]
    assert "at most 4" in problems[0]
    assert GaloreConfig(rank=4, targets=("q_proj", "down_proj")).check_model(shapes) == []

"""GaLore, Fira and APOLLO equal a plain reading of their algorithms in float64."""

from math import sqrt

import pytest
import torch
from support.projected_models import (
    ADAM,
    NUM_STEPS,
    RANK,
    TARGETS,
    draw_gradients,
    draw_model,
    give_gradients,
    steps_next_to_adamw,
)
from torch import nn

from switchtitan import apply
from switchtitan.methods import METHODS
from switchtitan.methods.projected import (
    ApolloConfig,
    FiraConfig,
    GaloreConfig,
    leading_singular_vectors,
)
from switchtitan.numerics.random import generator_for

SEED, INTERVAL, GROWTH = 3, 4, 1.3
KEYS = {"update_interval": INTERVAL, "targets": TARGETS}
CONFIGS = {
    "galore": GaloreConfig(rank=RANK, scale=0.6, **KEYS),
    "fira": FiraConfig(rank=RANK, scale=0.6, max_norm_growth=GROWTH, **KEYS),
    "apollo": ApolloConfig(rank=RANK, scale=0.6, max_norm_growth=GROWTH, **KEYS),
    "apollo_mini": ApolloConfig(rank=1, scaling="tensor", scale=sqrt(7), **KEYS),
}


def build(model, config, adam=ADAM, compile_step=False):
    method = METHODS.build(config, NUM_STEPS, SEED)
    return method.build_optimizer(model, adam, compile_step)


class Reference:
    """One weight, whose gradient is projected on the left: tall and square ones are transposed.

    The order of eps and bias correction is that of the authors' codes.
    """

    def __init__(self, name, weight, config):
        self.name, self.config = name, config
        self.weight = weight.detach().double().clone()
        self.mean = self.mean_square = torch.zeros((), dtype=torch.float64)
        self.num_steps = 0
        self.last_norm, self.was_limited = None, False

    def step(self, grad, lr):
        is_turned = grad.shape[0] >= grad.shape[1]
        grad = (grad.T if is_turned else grad).double()
        if self.num_steps % INTERVAL == 0:
            self.basis = self.new_basis(grad)
        projected = self.basis.T @ grad
        self.num_steps += 1
        beta1, beta2 = ADAM.betas
        self.mean = beta1 * self.mean + (1 - beta1) * projected
        self.mean_square = beta2 * self.mean_square + (1 - beta2) * projected**2
        update = self.update(grad, projected, self.mean / (self.mean_square**0.5 + ADAM.eps))
        correction = (1 - beta2**self.num_steps) ** 0.5 / (1 - beta1**self.num_steps)
        self.weight -= lr * ADAM.weight_decay * self.weight
        self.weight -= lr * correction * (update.T if is_turned else update)

    def limited(self, update):
        """Fira's limiter: the norm grows by no more than a factor from step to step."""
        norm, growth = update.norm(), self.config.max_norm_growth
        self.was_limited = self.last_norm is not None and bool(norm > growth * self.last_norm)
        if self.was_limited:
            update = update * growth * self.last_norm / norm
        self.last_norm = update.norm()
        return update


class GaloreReference(Reference):
    """Algorithm 2 of the paper."""

    def new_basis(self, grad):
        columns = torch.linalg.svd(grad).U[:, :RANK]
        # The paper leaves signs open.
        signs = [1 if column[column.abs().argmax()] > 0 else -1 for column in columns.T]
        return columns * torch.tensor(signs)

    def update(self, grad, projected, normalized):
        return self.config.scale * self.basis @ normalized


class FiraReference(GaloreReference):
    """GaLore, and what the projection leaves out, scaled like Adam scales its columns.

    As in the authors' package, the rest lacks only `scale` times the projected gradient; the paper
    subtracts all of it.
    """

    def update(self, grad, projected, normalized):
        scale = self.config.scale
        factors = normalized.norm(dim=0) / projected.norm(dim=0)
        rest = (grad - scale * self.basis @ projected) * factors
        return scale * self.basis @ normalized + self.limited(rest)


class ApolloReference(Reference):
    """Algorithm 1 of the paper."""

    def new_basis(self, grad):
        number = self.num_steps // INTERVAL
        generator = generator_for(SEED, f"{self.name}.basis.{number}")
        rank = self.config.rank
        return torch.randn(len(grad), rank, generator=generator).double() / sqrt(rank)

    def update(self, grad, projected, normalized):
        dim = 0 if self.config.scaling == "channel" else None
        factors = normalized.norm(dim=dim) / (projected.norm(dim=dim) + 1e-8)
        return self.config.scale * self.limited(grad * factors)


REFERENCES = {
    GaloreConfig: GaloreReference,
    FiraConfig: FiraReference,
    ApolloConfig: ApolloReference,
}


@pytest.mark.parametrize(
    ("method", "compile_step"),
    [*((method, False) for method in CONFIGS), ("fira", True), ("apollo", True)],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_every_orientation_equals_the_reference_in_every_step(method, compile_step):
    config, model = CONFIGS[method], draw_model()
    optimizer = build(model, config, compile_step=compile_step)
    references = [
        REFERENCES[type(config)](f"{name}.weight", model.get_parameter(f"{name}.weight"), config)
        for name in TARGETS
    ]
    num_limited = 0
    for gradients, lr in steps_next_to_adamw(model, optimizer):
        for reference in references:
            reference.step(gradients[reference.name], lr)
            ours = model.get_parameter(reference.name).double()
            # Values of order 1, each step rounded at 6e-8; norms are sums of up to 45 squares.
            torch.testing.assert_close(ours, reference.weight, rtol=2e-6, atol=2e-6)
        now_limited = sum(reference.was_limited for reference in references)
        share = optimizer.metrics().get("projection/limited_share", 0)
        assert share == pytest.approx(now_limited / len(TARGETS))
        num_limited += now_limited
    assert optimizer.metrics()["projection/refreshes"] == 6
    if method != "galore":
        assert 0.1 < num_limited / (NUM_STEPS * len(TARGETS)) < 0.9, "limited always or never"


@pytest.mark.parametrize(
    ("method", "has_basis", "has_norms"),
    [("galore", True, False), ("fira", True, True), ("apollo", False, True)],
)
def test_state_is_low_rank_and_only_drawn_bases_are_left_out(method, has_basis, has_norms):
    state = build(draw_model(), CONFIGS[method]).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes["q_proj.weight.exp_avg"] == shapes["q_proj.weight.exp_avg_sq"] == (5, 3)
    assert shapes["up_proj.weight.exp_avg"] == (7, RANK)
    assert shapes["down_proj.weight.exp_avg"] == (RANK, 9)
    assert shapes["up_proj.bias.exp_avg"] == (7,)
    bases = [shape for name, shape in shapes.items() if name.endswith("basis")]
    assert bases == [(5, RANK)] * len(TARGETS) * has_basis
    norms = [shape for name, shape in shapes.items() if name.endswith("update_norms")]
    assert norms == [(len(TARGETS),)] * has_norms


@pytest.mark.parametrize("method", ["galore", "fira"])
def test_a_gradient_is_left_as_it_was_and_one_that_is_not_finite_to_the_trainer(method):
    model = draw_model()
    optimizer = build(model, CONFIGS[method])
    gradients = next(draw_gradients(1))
    give_gradients(model, gradients)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name
    model.q_proj.weight.grad[1, 2] = torch.nan
    optimizer = build(model, CONFIGS[method])
    optimizer.step()
    assert model.q_proj.weight.isnan().any()


@pytest.fixture
def package_with_signs(monkeypatch):
    """Makes the largest entry of each of the package's singular vectors positive, as ours is.

    The package keeps moments when a sign changes, so its results depend on the decomposition.
    """
    from fira.gradient_projection import GradientProjector

    decompose = GradientProjector.get_orthogonal_matrix

    def signed(self, weights, rank, type):
        vectors = decompose(self, weights, rank, type)
        rows = vectors if type == "right" else vectors.T
        rows = rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
        return rows if type == "right" else rows.T

    monkeypatch.setattr(GradientProjector, "get_orthogonal_matrix", signed)


@pytest.mark.usefixtures("package_with_signs")
@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_weights_equal_those_of_firas_package(scale):
    import fira

    # The package decays weights after the update. Its limit of growth is fixed.
    adam = ADAM.model_copy(update={"weight_decay": 0.0})
    model, theirs = draw_model(), draw_model()
    ours = build(model, FiraConfig(rank=RANK, scale=scale, **KEYS), adam)
    projected = {"rank": RANK, "update_proj_gap": INTERVAL, "alpha": scale, "proj_type": "std"}
    projected["params"] = [theirs.get_parameter(f"{name}.weight") for name in TARGETS]
    keys = {"lr": adam.lr, "betas": adam.betas, "eps": adam.eps}
    package = fira.FiraAdamW([projected], **keys, no_deprecation_warning=True)
    num_limited = 0
    for gradients in draw_gradients(10):
        give_gradients(model, gradients)
        give_gradients(theirs, gradients)
        ours.step()
        package.step()
        num_limited += ours.metrics()["projection/limited_share"] > 0
        for name in TARGETS:
            found, expected = (m.get_parameter(f"{name}.weight") for m in (model, theirs))
            # The package decomposes in fp32, with errors of about 1e-6 in its bases.
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert num_limited > 0


@pytest.mark.parametrize("shape", [(90, 60), (60, 90)])
def test_the_subspace_is_exact_where_singular_values_fall_far(shape):
    """From 1 to 1e-6: in fp32, the Gram matrix would lose those below 3e-4."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    left, _, right = torch.linalg.svd(noise, full_matrices=False)
    grad = (left * torch.logspace(0, -6, 60, dtype=torch.float64) @ right).float()
    ours = leading_singular_vectors(grad, 30)
    assert ours.dtype == torch.float32
    u, _, vh = torch.linalg.svd(grad.double(), full_matrices=False)
    exact, ours = (vh.T if shape[0] > shape[1] else u)[:, :30], torch.linalg.qr(ours.double()).Q
    # The largest sine of the angles between both. Rounded to fp32 once, at 6e-8 per entry.
    assert torch.linalg.matrix_norm(ours - exact @ (exact.T @ ours), ord=2) < 1e-6


@pytest.mark.parametrize("name", ["galore", "fira", "apollo"])
def test_with_moments_in_8_bits_weights_stay_close_to_those_of_fp32(name):
    trained = {}
    for optimizer_name in ("adamw8bit", "adamw"):
        torch.manual_seed(0)
        # One is projected on the left, and one on the right.
        model = nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 128))
        start = [layer.weight.detach().clone() for layer in model]
        # Bases follow from the first gradients alone, which are equal.
        keys = {"rank": 64, "update_interval": NUM_STEPS, "targets": ["0", "1"]}
        method = apply(model, name, num_steps=NUM_STEPS, **keys)
        optimizer = method.optimizer(optimizer_name, lr=1e-2)
        for _ in range(NUM_STEPS):
            model(torch.randn(16, 128)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained[optimizer_name] = [layer.weight.detach() for layer in model]
    for before, in_8_bits, exact in zip(start, *trained.values(), strict=True):
        # A code has 3 to 7 bits of mantissa: a few per cent of each update.
        assert 0 < (in_8_bits - exact).norm() < 0.05 * (exact - before).norm()

"""APOLLO equals a literal re-implementation; the norm limiter and update directions work."""

from math import sqrt

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
from switchtitan.distributed.seeds import generator_for
from switchtitan.methods.apollo import Apollo, ApolloConfig
from switchtitan.optim import AdamWConfig

CHANNEL = ApolloConfig(
    rank=RANK, update_interval=4, targets=TARGETS, scale=0.6, max_norm_growth=1.3
)
MINI = ApolloConfig(rank=1, update_interval=4, targets=TARGETS, scaling="tensor", scale=sqrt(7))
CONFIGS = pytest.mark.parametrize("config", [CHANNEL, MINI], ids=["channel", "mini"])
# An eps that matters, so that where it is added shows.
SEED = 3


def build(
    model: OddModel, config: ApolloConfig, compile_step: bool = False, adam: AdamWConfig = ADAM
) -> TrainingOptimizer:
    return Apollo(config, NUM_STEPS, SEED).build_optimizer(model, adam, compile_step)


class Reference:
    """APOLLO for one weight: Algorithm 1 with the authors' order of eps and bias correction."""

    def __init__(self, name: str, weight: Tensor, config: ApolloConfig) -> None:
        self.name, self.weight, self.config = name, weight.detach().clone(), config
        self.mean = self.mean_square = torch.zeros(())
        self.num_steps = 0
        self.last_norm: Tensor | None = None
        self.was_limited = False

    def step(self, grad: Tensor, lr: float) -> None:
        config = self.config
        # Wide, as in the paper: tall and square matrices are transposed.
        is_turned = grad.shape[0] >= grad.shape[1]
        wide = grad.T if is_turned else grad
        if self.num_steps % config.update_interval == 0:
            generator = generator_for(
                SEED, f"{self.name}.basis.{self.num_steps // config.update_interval}"
            )
            self.projection = torch.randn(wide.shape[0], config.rank, generator=generator).T / sqrt(
                config.rank
            )
        projected = self.projection @ wide
        self.num_steps += 1
        beta1, beta2 = ADAM.betas
        self.mean = beta1 * self.mean + (1 - beta1) * projected
        self.mean_square = beta2 * self.mean_square + (1 - beta2) * projected**2
        normalized = self.mean / (self.mean_square**0.5 + ADAM.eps)
        if config.scaling == "channel":
            scaled = wide * (normalized.norm(dim=0) / (projected.norm(dim=0) + 1e-8))
        else:
            scaled = wide * (normalized.norm() / (projected.norm() + 1e-8))
        norm = scaled.norm()
        self.was_limited = self.last_norm is not None and bool(
            norm > config.max_norm_growth * self.last_norm
        )
        if self.was_limited:
            scaled = scaled * config.max_norm_growth * self.last_norm / norm
        self.last_norm = scaled.norm()
        correction = (1 - beta2**self.num_steps) ** 0.5 / (1 - beta1**self.num_steps)
        self.weight -= lr * ADAM.weight_decay * self.weight
        self.weight -= lr * correction * config.scale * (scaled.T if is_turned else scaled)


@pytest.mark.parametrize("compile_step", [False, True])
@CONFIGS
def test_every_orientation_equals_the_reference_in_every_step(config, compile_step):
    torch._dynamo.reset()
    model = draw_model()
    optimizer = build(model, config, compile_step)
    references = [
        Reference(f"{name}.weight", model.get_parameter(f"{name}.weight"), config)
        for name in TARGETS
    ]
    num_limited = 0
    for gradients, lr in steps_next_to_adamw(model, optimizer):
        for reference in references:
            reference.step(gradients[reference.name], lr)
            # Values of order 1, each step rounded at 6e-8; norms are sums of up to 45 squares.
            torch.testing.assert_close(
                model.get_parameter(reference.name), reference.weight, rtol=1e-6, atol=1e-6
            )
        now_limited = sum(reference.was_limited for reference in references)
        assert optimizer.metrics()["projection/limited_share"] == pytest.approx(
            now_limited / len(TARGETS)
        )
        num_limited += now_limited
    # The limiter was at work, and not always.
    assert 0.1 < num_limited / (NUM_STEPS * len(TARGETS)) < 0.9
    assert optimizer.metrics()["projection/refreshes"] == 6


@CONFIGS
def test_the_norm_of_an_update_grows_by_no_more_than_the_limit(config):
    model = draw_model(torch.float64)
    adam = ADAM.model_copy(update={"weight_decay": 0.0})
    optimizer = build(model, config, adam=adam)
    before = {name: model.get_parameter(f"{name}.weight").detach().clone() for name in TARGETS}
    last_norms: dict[str, Tensor] = {}
    beta1, beta2 = adam.betas
    for step, gradients in enumerate(draw_gradients(NUM_STEPS, torch.float64), start=1):
        give_gradients(model, gradients)
        optimizer.step()
        correction = (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        for name in TARGETS:
            weight = model.get_parameter(f"{name}.weight").detach()
            norm = (weight - before[name]).norm() / correction
            # 1e-8 is added to the last norm, of order 0.1.
            assert norm <= config.max_norm_growth * last_norms.get(name, torch.inf) * (1 + 1e-6)
            last_norms[name], before[name] = norm, weight.clone()


@CONFIGS
def test_updates_are_gradients_scaled_along_the_larger_dimension_or_as_a_whole(config):
    model = draw_model(torch.float64)
    optimizer = build(model, config, adam=ADAM.model_copy(update={"weight_decay": 0.0}))
    for gradients in draw_gradients(6, torch.float64):
        before = {name: model.get_parameter(f"{name}.weight").detach().clone() for name in TARGETS}
        give_gradients(model, gradients)
        optimizer.step()
        for name in TARGETS:
            ratio = (before[name] - model.get_parameter(f"{name}.weight")) / gradients[
                f"{name}.weight"
            ]
            assert (ratio > 0).all()
            num_rows, num_columns = ratio.shape
            along = ratio if num_rows >= num_columns else ratio.T
            torch.testing.assert_close(along, along[:, :1].expand_as(along))
            if config.scaling == "tensor":
                torch.testing.assert_close(along, along[:1, :1].expand_as(along))
            else:
                assert along[:, 0].std() > 1e-3 * along[:, 0].mean()


def test_bases_are_drawn_anew_and_not_saved():
    model, resumed_model = draw_model(), draw_model()
    optimizer = build(model, CHANNEL)
    assert not any("basis" in name for name in optimizer.state_dict())
    steps = list(draw_gradients(7))
    for gradients in steps[:6]:
        give_gradients(model, gradients)
        optimizer.step()
    resumed_model.load_state_dict(model.state_dict())
    resumed = build(resumed_model, CHANNEL)
    resumed.load_state_dict(
        {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    )
    for one, other in ((model, optimizer), (resumed_model, resumed)):
        give_gradients(one, steps[6])
        other.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(resumed_model.get_parameter(name), parameter), name

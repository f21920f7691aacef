"""ReLoRA equals a literal re-implementation over torch's AdamW, on a float64 LLaMA; when resets
come, and what they keep."""

import math

import pytest
import torch
from pydantic import ValidationError
from support.small_llama import SEED, draw_model, loss_and_gradients
from support.switchlora_reference import constant_candidates
from torch import nn

from switchtitan.distributed.random import generator_for
from switchtitan.methods.lowrank import LowRankLinear, low_rank_layers
from switchtitan.methods.lowrank.rounding import FrozenWeights
from switchtitan.methods.relora import (
    Relora,
    ReloraConfig,
    ReloraOptimizer,
    largest,
    merge_and_restart_,
)
from switchtitan.optim import AdamW, AdamWConfig, TrainedParameter

NUM_STEPS, INTERVAL, WARMUP = 28, 7, 3
ADAMW = AdamWConfig(lr=3e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, decay_norms=True)
TOLERANCE = 1e-10  # float64 rounds at 1e-16; Adam with eps 1e-6 amplifies by up to 1e5


@pytest.fixture
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def relora(seed=SEED, interval=INTERVAL, warmup=WARMUP, **keys):
    keys |= {"reset_interval": interval, "restart_warmup_steps": warmup}
    return Relora(ReloraConfig(rank=5, alpha=2.5, **keys), NUM_STEPS, seed)


def build(method, adamw=ADAMW):
    model = draw_model(method)
    return model, method.build_optimizer(model, adamw, compile_step=False)


def train(model, optimizer, steps):
    for step in steps:
        loss_and_gradients(model, step)
        optimizer.set_lr(1.0)
        optimizer.step()
        optimizer.zero_grad()


class ReferenceLayer(nn.Module):
    def __init__(self, ours):
        super().__init__()
        self.W, self.scale = ours.weight.detach().clone(), ours.scale
        self.A = nn.Parameter(ours.lora_a.detach().clone())
        self.B = nn.Parameter(ours.lora_b.detach().clone())

    def forward(self, x):
        return x @ self.W.T + self.scale * (x @ self.A.T) @ self.B


class Reference:
    """All parameters in one torch optimizer; resets as in the paper's Algorithm 1."""

    def __init__(self, method_keys):
        self.keys = method_keys
        self.model = draw_model(relora(**method_keys))
        self.layers = {
            name: ReferenceLayer(layer) for name, layer in low_rank_layers(self.model).items()
        }
        for name, layer in self.layers.items():
            self.model.set_submodule(name, layer)
        keys = ADAMW.model_dump(include={"lr", "betas", "eps", "weight_decay"})
        # Not fused, so that the implementation is independent.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), foreach=False, **keys)

    def set_lr(self, step, factor):
        since, restarted = step % INTERVAL, step >= INTERVAL
        jagged = (since + 1) / WARMUP if restarted and since < WARMUP else 1.0
        self.optimizer.param_groups[0]["lr"] = ADAMW.lr * factor * jagged

    @torch.no_grad()
    def finish(self, step):
        self.optimizer.step()
        number, rest = divmod(step + 1, INTERVAL)
        if rest or step + 1 == NUM_STEPS:
            return
        for name, layer in self.layers.items():
            layer.W += layer.scale * layer.B.T @ layer.A
            bound = 1 / math.sqrt(layer.A.shape[1])
            key = f"{name}.lora_a:{number}"
            layer.A.copy_(constant_candidates(SEED, key, *layer.A.shape, bound))
            layer.B.zero_()
            for factor, factor_name in ((layer.A, "lora_a"), (layer.B, "lora_b")):
                self.prune(factor, f"{name}.{factor_name}", number)

    def prune(self, factor, name, number):
        how, ratio = self.keys.get("reset_moments", "magnitude"), self.keys.get("prune_ratio", 0.9)
        if how == "zero":
            del self.optimizer.state[factor]
            return
        lots = torch.rand(factor.shape, generator=generator_for(SEED, f"{name}.moments:{number}"))
        state = self.optimizer.state[factor]
        for key in ("exp_avg", "exp_avg_sq"):
            scores = state[key].abs() if how == "magnitude" else lots
            threshold = scores.flatten().kthvalue(round(ratio * scores.numel())).values
            state[key][scores <= threshold] = 0
        state["exp_avg"][state["exp_avg_sq"] == 0] = 0


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"prune_ratio": 0.5},
        {"reset_moments": "random", "prune_ratio": 0.8},
        {"reset_moments": "zero"},
    ],
    ids=["magnitude", "magnitude-half", "random", "zero"],
)
def test_whole_model_follows_a_plain_reference_through_three_resets(keys):
    model, optimizer = build(relora(**keys))
    reference = Reference(keys)
    for step in range(NUM_STEPS):
        factor = 1 / (1 + step / 10)
        loss = loss_and_gradients(model, step)
        assert loss == pytest.approx(loss_and_gradients(reference.model, step), abs=TOLERANCE), step
        optimizer.set_lr(factor)
        optimizer.step()
        reference.set_lr(step, factor)
        reference.finish(step)
        lr = reference.optimizer.param_groups[0]["lr"]
        assert optimizer.metrics()["optimizer/lr"] == pytest.approx(lr, rel=1e-12)
    assert optimizer.metrics()["reset/resets_total"] == 3
    for name, layer in low_rank_layers(model).items():
        theirs = reference.layers[name]
        ours = [layer.weight, layer.lora_a, layer.lora_b]
        expected = [theirs.W, theirs.A, theirs.B]
        for tensor, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(tensor.detach(), other.detach(), rtol=0, atol=TOLERANCE)
        assert layer.lora_b.any(), "the last step is followed by no reset"


def test_keys_that_do_not_fit_together():
    with pytest.raises(ValidationError, match="restart_warmup_steps = 8"):
        ReloraConfig(rank=4, reset_interval=8, restart_warmup_steps=8)
    ReloraConfig(rank=4, reset_interval=8, restart_warmup_steps=7)
    zero = ReloraConfig(rank=4, reset_interval=200, reset_moments="zero", prune_ratio=0.5)
    (message,) = zero.without_effect()
    assert message.startswith("prune_ratio = 0.5 has no effect")


def test_an_interval_that_no_reset_would_come_within_is_refused():
    config = ReloraConfig(rank=4, reset_interval=200)
    assert config.check_length(201) == []
    (problem,) = config.check_length(200)
    assert "reset_interval = 200" in problem


OUT, IN, RANK = 7, 5, 3


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = LowRankLinear(IN, OUT, RANK, 0.5, (0.4, 0.0))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def test_a_reset_keeps_what_the_layer_computes_and_draws_a_by_the_number(layer):
    x, old = torch.randn(11, IN), layer.lora_a.detach().clone()
    before, weights = layer(x).detach(), FrozenWeights({"layer": layer}, SEED, False)
    merge_and_restart_({"layer": layer}, weights, 1, SEED)
    # Sums of five products of order 1, each rounded at 6e-8.
    torch.testing.assert_close(layer(x).detach(), before, rtol=1e-5, atol=2e-6)
    assert not layer.lora_b.any()
    first = layer.lora_a.detach().clone()
    assert first.abs().max() <= IN**-0.5
    assert not torch.equal(first, old)
    merge_and_restart_({"layer": layer}, weights, 1, SEED)
    assert torch.equal(layer.lora_a, first)
    merge_and_restart_({"layer": layer}, weights, 2, SEED)
    assert not torch.equal(layer.lora_a, first)


@pytest.mark.parametrize("num_levels", [1, 3, 10**6])
@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.999])
def test_the_largest_are_those_of_a_stable_sort(num_levels, ratio):
    scores = (torch.rand(31, 29, generator=generator_for(5, "scores")) * num_levels).floor()
    order = scores.flatten().argsort(descending=True, stable=True)
    expected = torch.zeros(scores.numel(), dtype=torch.bool)
    expected[order[: scores.numel() - round(ratio * scores.numel())]] = True
    assert torch.equal(largest(scores, ratio), expected.view(scores.shape))
    assert not largest(torch.ones(1, 1), 0.9).any()


def schedule(interval, warmup, num_steps):
    """The optimizer of one layer that gets no gradients: nothing but resets."""
    config = ReloraConfig(rank=RANK, reset_interval=interval, restart_warmup_steps=warmup)
    layer = LowRankLinear(IN, OUT, RANK, 0.5, (0.4, 0.0))
    nn.init.zeros_(layer.weight)
    trained = [TrainedParameter(f"layer.{key}", p) for key, p in layer.named_parameters()]
    inner = AdamW(ADAMW, [entry for entry in trained if entry.parameter.requires_grad])
    return ReloraOptimizer(config, {"layer": layer}, inner, num_steps, seed=0)


def run(optimizer, num_steps):
    """The factors of `num_steps` steps, and the numbers of steps after which there was a reset."""
    factors, resets, num_resets = [], [], optimizer.metrics()["reset/resets_total"]
    for step in range(1, num_steps + 1):
        optimizer.set_lr(0.5)
        metrics = optimizer.metrics()
        assert metrics["optimizer/lr"] == ADAMW.lr * (0.5 * metrics["reset/lr_factor"])
        factors.append(metrics["reset/lr_factor"])
        optimizer.step()
        if optimizer.metrics()["reset/resets_total"] > num_resets + len(resets):
            resets.append(step)
    return factors, resets


@pytest.mark.parametrize(("num_steps", "expected"), [(20, [5, 10, 15]), (21, [5, 10, 15, 20])])
def test_resets_follow_every_interval_but_not_the_last_step(num_steps, expected):
    assert run(schedule(5, 2, num_steps), num_steps)[1] == expected


def test_the_learning_rate_rises_linearly_from_zero_at_a_reset():
    factors, _ = run(schedule(6, 4, 13), 13)
    assert factors == [1] * 6 + [0.25, 0.5, 0.75, 1, 1, 1] + [0.25]
    assert run(schedule(3, 0, 10), 10)[0] == [1] * 10


def test_a_run_that_is_made_longer_has_no_reset_where_it_first_ended():
    first, longer = schedule(4, 3, 8), schedule(4, 3, 16)
    assert run(first, 8)[1] == [4]
    longer.load_state_dict(first.state_dict())
    factors, resets = run(longer, 8)
    assert factors[:4] == [1] * 4
    assert resets == [4]

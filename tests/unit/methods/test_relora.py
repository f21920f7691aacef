"""ReLoRA equals a literal re-implementation over torch's AdamW, on a float64 LLaMA; when resets
come, and what they keep."""

import math

import pytest
import torch
from support.small_llama import SEED, draw_model, loss_and_gradients
from support.switchlora_reference import constant_candidates
from torch import nn

from switchtitan.methods.adapter.linear import AdapterLinear, adapter_layers
from switchtitan.methods.relora import Relora, ReloraConfig, ReloraOptimizer, largest
from switchtitan.methods.targets import FACTORS
from switchtitan.numerics.random import generator_for
from switchtitan.optim.adamw import AdamW, AdamWConfig
from switchtitan.optim.parameters import TrainedParameter

NUM_STEPS, INTERVAL, WARMUP = 28, 7, 3
ADAMW = AdamWConfig(lr=3e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, decay_norms=True)
TOLERANCE = 1e-10  # float64 rounds at 1e-16; Adam with eps 1e-6 amplifies by up to 1e5


def relora(**keys):
    keys |= {"reset_interval": INTERVAL, "restart_warmup_steps": WARMUP}
    return Relora(ReloraConfig(rank=5, alpha=2.5, **keys), NUM_STEPS, SEED)


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
            name: ReferenceLayer(layer) for name, layer in adapter_layers(self.model).items()
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


@pytest.mark.usefixtures("float64")
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
    method, reference = relora(**keys), Reference(keys)
    model = draw_model(method)
    optimizer = method.build_optimizer(model, ADAMW, compile_step=False)
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
    for name, layer in adapter_layers(model).items():
        theirs = reference.layers[name]
        ours, expected = (layer.weight, layer.lora_a, layer.lora_b), (theirs.W, theirs.A, theirs.B)
        torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE)
        assert layer.lora_b.any(), "the last step is followed by no reset"


def test_of_equal_scores_the_first_are_kept():
    scores = torch.tensor([[1.0, 3.0, 1.0], [3.0, 1.0, 0.0]])
    assert largest(scores, 0.5).tolist() == [[True, True, False], [True, False, False]]
    assert largest(scores, 0.34).tolist() == [[True, True, True], [True, False, False]]
    assert not largest(torch.ones(1, 1), 0.9).any()


def run(optimizer, num_steps):
    """The learning rates' factors in `num_steps` steps, and the number of resets after each."""
    factors, resets = [], []
    for _ in range(num_steps):
        optimizer.set_lr(0.5)
        factors.append(optimizer.metrics()["reset/lr_factor"])
        optimizer.step()
        resets.append(optimizer.metrics()["reset/resets_total"])
    return factors, resets


def test_a_run_that_is_made_longer_has_no_reset_where_it_first_ended():
    config = ReloraConfig(rank=3, reset_interval=4, restart_warmup_steps=3)
    layer = AdapterLinear(5, 7, 3, 0.5, (0.4, 0.0))
    nn.init.zeros_(layer.weight)
    # It gets no gradients: nothing but resets.
    factors = [TrainedParameter(f"layer.{key}", layer.get_parameter(key)) for key in FACTORS]
    first, longer = (
        ReloraOptimizer(config, {"layer": layer}, AdamW(ADAMW, factors), num_steps, seed=0)
        for num_steps in (8, 16)
    )
    assert run(first, 8) == ([1] * 4 + [1 / 3, 2 / 3, 1, 1], [0] * 3 + [1] * 5)
    longer.load_state_dict(first.state_dict())
    assert run(longer, 8) == ([1] * 4 + [1 / 3, 2 / 3, 1, 1], [1] * 3 + [2] * 5)

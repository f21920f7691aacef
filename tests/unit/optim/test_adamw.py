"""AdamW equals torch's, fused or compiled."""

import pytest
import torch
from support.optimizer_steps import draw, parameters
from torch import nn

from switchtitan.optim import AdamW, AdamWConfig, TrainedParameter

SHAPES = {"a.weight": (5, 7), "b.weight": (3,), "c.weight": (2, 3)}
CONFIG = AdamWConfig(lr=0.03, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.2, decay_norms=True)


def ours(named: dict[str, nn.Parameter], compile_step: bool = False) -> AdamW:
    return AdamW(CONFIG, [TrainedParameter(*item) for item in named.items()], compile_step)


def theirs(named: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        named.values(),
        lr=CONFIG.lr,
        betas=CONFIG.betas,
        eps=CONFIG.eps,
        weight_decay=CONFIG.weight_decay,
        fused=True,
    )


def train_both(
    optimizer: AdamW, named: dict[str, nn.Parameter], num_steps: int = 12
) -> dict[str, nn.Parameter]:
    """Step `optimizer` and torch's with equal gradients and rates; return torch's parameters."""
    reference = parameters(SHAPES)
    torch_optimizer = theirs(reference)
    for step in range(num_steps):
        lr_factor = (step + 1) / num_steps
        optimizer.set_lr(lr_factor)
        torch_optimizer.param_groups[0]["lr"] = CONFIG.lr * lr_factor
        for one, other, gradient in zip(
            named.values(), reference.values(), draw(SHAPES, step), strict=True
        ):
            one.grad, other.grad = gradient, gradient.clone()
        if step % 3 == 1:
            # A parameter without a gradient waits, and keeps its own count of steps.
            named["b.weight"].grad = reference["b.weight"].grad = None
        optimizer.step()
        torch_optimizer.step()
    return reference


def test_the_fused_update_is_torch_s_bit_for_bit():
    named = parameters(SHAPES)
    reference = train_both(ours(named), named)
    for name, parameter in named.items():
        assert torch.equal(parameter, reference[name]), name


def test_the_compiled_update_is_torch_s_to_rounding():
    named = parameters(SHAPES)
    torch._dynamo.reset()
    reference = train_both(ours(named, compile_step=True), named)
    start = parameters(SHAPES)
    for name, parameter in named.items():
        # 12 updates of order 0.01 to 1, each rounded in another order in fp32.
        torch.testing.assert_close(parameter, reference[name], rtol=1e-5, atol=1e-6)
        assert (parameter - start[name]).abs().max() > 0.01


@pytest.mark.parametrize("compile_step", [False, True])
def test_state_goes_into_a_fresh_optimizer_in_place(compile_step: bool):
    named = parameters(SHAPES)
    optimizer = ours(named, compile_step)
    train_both(optimizer, named, num_steps=4)
    saved = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    assert saved.keys() == {
        f"{name}.{key}" for name in SHAPES for key in ("exp_avg", "exp_avg_sq", "step")
    }
    assert saved["a.weight.step"] == 4
    assert saved["b.weight.step"] == 3
    copies = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in named.items()}
    fresh = ours(copies, compile_step)
    fresh.load_state_dict(saved)
    for one, other in ((optimizer, named), (fresh, copies)):
        one.set_lr(0.5)
        for parameter, gradient in zip(other.values(), draw(SHAPES, 77), strict=True):
            parameter.grad = gradient
        one.step()
    for name in SHAPES:
        assert torch.equal(copies[name], named[name]), name


def test_rate_is_reported_gradients_are_dropped_and_a_step_without_any_changes_nothing():
    named = parameters(SHAPES)
    optimizer = ours(named)
    optimizer.set_lr(0.25)
    assert optimizer.metrics() == {"optimizer/lr": CONFIG.lr * 0.25}
    named["a.weight"].grad = torch.ones(SHAPES["a.weight"])
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in named.values())
    optimizer.step()
    for name, start in parameters(SHAPES).items():
        assert torch.equal(named[name], start)
    assert not any(tensor.any() for tensor in optimizer.state_dict().values())

"""torch optimizers chosen by name step as torch's classes do; their state is saved by name."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from support.optimizer_steps import draw, parameters, train
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from switchtitan.contracts import OptimizerConfig, TrainingOptimizer
from switchtitan.optim import OPTIMIZERS, AdamWConfig, TrainedParameter
from switchtitan.optim.torch_optimizer import AdafactorConfig, SGDConfig, TorchOptimizer

LR, OTHER_LR, DECAY = 0.03, 0.007, 0.2
SHAPES = {
    "embed.weight": (6, 7),
    "layers.0.proj.weight": (5, 7),
    "layers.0.norm.weight": (5,),
    "head.weight": (6, 5),
}
METHOD_TREATS = ("layers.0.proj.weight",)
KEYS = {"lr": LR, "other_lr": OTHER_LR, "weight_decay": DECAY}
ADAMW = partial(torch.optim.AdamW, betas=(0.9, 0.999), eps=1e-8, fused=True)
# The section, and the class of torch.
CHOICES: dict[str, tuple[OptimizerConfig, Callable]] = {
    "adamw": (AdamWConfig(**KEYS), ADAMW),
    "sgd": (
        SGDConfig(**KEYS, momentum=0.8, nesterov=True),
        partial(torch.optim.SGD, momentum=0.8, nesterov=True),
    ),
    "sgd_without_momentum": (SGDConfig(**KEYS, momentum=0.0), torch.optim.SGD),
    "adafactor": (
        AdafactorConfig(**KEYS, beta2_decay=-0.7, eps=1e-2, clip_threshold=1.5),
        partial(torch.optim.Adafactor, beta2_decay=-0.7, eps=(None, 1e-2), d=1.5),
    ),
}


def ours(
    config: OptimizerConfig, named: dict[str, nn.Parameter], compile_step: bool = False
) -> TrainingOptimizer:
    trained = [
        TrainedParameter(
            name,
            parameter,
            is_other=name not in METHOD_TREATS,
            is_in_block=name.startswith("layers."),
        )
        for name, parameter in named.items()
    ]
    return OPTIMIZERS.build(config, trained, compile_step, 0)


def by_hand(choice: str, named: dict[str, nn.Parameter]) -> dict[str, torch.optim.Optimizer]:
    """One optimizer of torch for each parameter, with its rate and decay written out."""
    _, build = CHOICES[choice]
    rates = {"embed.weight": (OTHER_LR, DECAY), "layers.0.proj.weight": (LR, DECAY)}
    rates |= {"layers.0.norm.weight": (OTHER_LR, 0.0), "head.weight": (OTHER_LR, DECAY)}
    return {
        name: build([parameter], lr=rates[name][0], weight_decay=rates[name][1])
        for name, parameter in named.items()
    }


def train_by_hand(choice: str, num_steps: int) -> dict[str, nn.Parameter]:
    named = parameters(SHAPES)
    optimizers = by_hand(choice, named)
    peaks = {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}
    for step in range(num_steps):
        for (name, optimizer), gradient in zip(optimizers.items(), draw(SHAPES, step), strict=True):
            optimizer.param_groups[0]["lr"] = peaks[name] * ((step + 1) / 12)
            named[name].grad = gradient
            optimizer.step()
    return named


@pytest.mark.parametrize("choice", CHOICES)
def test_every_optimizer_steps_as_torch_s_class_by_hand(choice):
    named = parameters(SHAPES)
    train(ours(CHOICES[choice][0], named), named, range(12))
    start = parameters(SHAPES)
    for name, expected in train_by_hand(choice, 12).items():
        assert torch.equal(named[name], expected), name
        assert (expected - start[name]).abs().max() > 1e-3, name


def test_norms_decay_like_all_others_if_the_section_says_so():
    moved = {}
    for decays in (False, True):
        named = parameters(SHAPES)
        config = SGDConfig(lr=LR, weight_decay=DECAY, decay_norms=decays, momentum=0.0)
        optimizer = ours(config, named)
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        moved[decays] = named
    start = parameters(SHAPES)
    for name, value in start.items():
        decayed = value.detach() - LR * DECAY * value.detach()
        torch.testing.assert_close(moved[True][name].detach(), decayed, rtol=1e-6, atol=0)
        expected = value.detach() if name.endswith("norm.weight") else decayed
        torch.testing.assert_close(moved[False][name].detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("choice", CHOICES)
def test_state_moves_by_name_into_a_fresh_optimizer(choice):
    config = CHOICES[choice][0]
    straight = parameters(SHAPES)
    train(ours(config, straight), straight, range(9))

    first = parameters(SHAPES)
    optimizer = ours(config, first)
    train(optimizer, first, range(4))
    saved = {key: tensor.clone() for key, tensor in optimizer.state_dict().items()}
    copies = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in first.items()}
    fresh = ours(config, copies)
    # As in loading a checkpoint: load the tensors of the state, then notify the optimizer.
    state = fresh.state_dict()
    assert state.keys() == saved.keys()
    for key, tensor in state.items():
        tensor.copy_(saved[key])
    fresh.load_state_dict(state)
    train(fresh, copies, range(4, 9))
    for name, expected in straight.items():
        assert torch.equal(copies[name], expected), name


@pytest.mark.parametrize("choice", [*CHOICES, "nadam"])
def test_asking_for_the_state_before_the_first_step_changes_nothing(choice):
    def build(named):
        if choice != "nadam":
            return ours(CHOICES[choice][0], named)
        # Its state does not start at zero: `mu_product` is 1.
        trained = [TrainedParameter(*item) for item in named.items()]
        return TorchOptimizer(SGDConfig(lr=LR), trained, torch.optim.NAdam)

    plain, asked = parameters(SHAPES), parameters(SHAPES)
    train(build(plain), plain, range(5))
    optimizer = build(asked)
    keys = optimizer.state_dict().keys()
    for name, start in parameters(SHAPES).items():
        assert torch.equal(asked[name], start)
        assert asked[name].grad is None
    train(optimizer, asked, range(5))
    assert optimizer.state_dict().keys() == keys
    for name, expected in plain.items():
        assert torch.equal(asked[name], expected), name


@pytest.mark.parametrize("choice", ["sgd", "sgd_without_momentum"])
def test_a_compiled_step_is_the_same_to_rounding_and_compiles_once(choice):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = CHOICES[choice][0]
    named, eager = parameters(SHAPES), parameters(SHAPES)
    optimizer = ours(config, named, compile_step=True)
    train(optimizer, named, range(3))
    num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, named, range(3, 12))
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_graphs
    train(ours(config, eager), eager, range(12))
    for name, expected in eager.items():
        # 12 updates of order 0.01, each rounded in another order in fp32.
        torch.testing.assert_close(named[name], expected, rtol=1e-5, atol=1e-6)


def test_adafactor_gives_torch_one_parameter_at_a_time():
    named = parameters(SHAPES)
    optimizer = ours(CHOICES["adafactor"][0], named)
    seen = []

    def count(inner, args, kwargs):
        seen.append(sum(len(group["params"]) for group in inner.param_groups))

    hook = register_optimizer_step_pre_hook(count)
    try:
        train(optimizer, named, range(2))
    finally:
        hook.remove()
    assert seen == [1] * (2 * len(named))


def test_both_rates_are_reported():
    named = parameters(SHAPES)
    optimizer = ours(CHOICES["adamw"][0], named)
    optimizer.set_lr(0.25)
    assert optimizer.metrics() == {"optimizer/lr": 0.25 * LR, "optimizer/other_lr": 0.25 * OTHER_LR}
    assert ours(SGDConfig(lr=LR), parameters(SHAPES)).metrics() == {"optimizer/lr": LR}

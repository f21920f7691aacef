"""The low-rank layer replaces a linear layer and starts with the same function."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from switchtitan.contracts import Reparametrized
from switchtitan.distributed.seeds import generator_for
from switchtitan.errors import ConfigError
from switchtitan.methods import METHODS
from switchtitan.methods.lora import LoraConfig
from switchtitan.methods.lowrank import (
    LayerBuffer,
    LowRankLinear,
    balanced_init,
    lora_init,
    low_rank_layer_for,
    low_rank_layers,
    replace_linears,
)
from switchtitan.methods.lowrank.contraction import BY_NAME, cheapest_contraction, num_flops

OUT, IN, RANK, SCALE = 7, 5, 3, 0.37


def build_layer(**settings: object) -> LowRankLinear:
    layer = LowRankLinear(IN, OUT, RANK, SCALE, lora_init, **settings).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def draw_x(*leading: int) -> torch.Tensor:
    return torch.randn(
        *leading, IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(4,), (2, 6)])
def test_it_computes_the_dense_layer_of_its_merged_weight(bias: bool, leading: tuple[int, ...]):
    layer, x = build_layer(bias=bias), draw_x(*leading)
    expected = F.linear(x, layer.weight + SCALE * layer.lora_b.T @ layer.lora_a, layer.bias)
    # fp64 sums of a few terms of order 1.
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert all(p.grad is not None for name, p in layer.named_parameters() if name != "weight")
    assert (layer.bias is not None) == bias


@pytest.mark.parametrize("bias", [False, True])
def test_dropout_acts_in_training_on_the_way_into_the_factors_alone(bias: bool):
    dropout = 0.4
    layer, x = build_layer(bias=bias, dropout=dropout), draw_x(9)
    torch.manual_seed(5)
    dropped = layer(x)
    torch.manual_seed(5)
    masked = F.dropout(x, dropout)
    assert (masked == 0).any()
    expected = (
        F.linear(x, layer.weight, layer.bias) + SCALE * masked @ layer.lora_a.T @ layer.lora_b
    )
    torch.testing.assert_close(dropped, expected, rtol=1e-12, atol=1e-12)
    layer.eval()
    merged = F.linear(x, layer.weight + SCALE * layer.lora_b.T @ layer.lora_a, layer.bias)
    torch.testing.assert_close(layer(x), merged, rtol=1e-12, atol=1e-12)


def test_buffers_are_registered_and_declared_sharded():
    buffers = {
        "candidates_a": LayerBuffer((5, IN), torch.bfloat16),
        "candidates_b": LayerBuffer((5, OUT), is_on_host=True),
    }
    layer = LowRankLinear(IN, OUT, RANK, SCALE, lora_init, buffers=buffers)
    assert isinstance(layer, Reparametrized)
    assert layer.sharded_buffers() == ("candidates_a", "candidates_b")
    assert layer.host_buffers() == ("candidates_b",)
    assert layer.get_buffer("candidates_a").dtype == torch.bfloat16
    assert layer.get_buffer("candidates_b").dtype == layer.weight.dtype
    assert {name: tuple(b.shape) for name, b in layer.named_buffers()} == {
        "candidates_a": (5, IN),
        "candidates_b": (5, OUT),
    }


def build_model(device: str) -> nn.Module:
    with torch.device(device):
        inner = nn.ModuleDict({"up": nn.Linear(IN, OUT), "down": nn.Linear(OUT, IN, bias=False)})
        return nn.ModuleDict({"first": inner, "norm": nn.LayerNorm(IN), "head": nn.Linear(IN, 2)})


def replacement(name, linear: nn.Linear) -> LowRankLinear:
    return LowRankLinear(
        linear.in_features,
        linear.out_features,
        RANK,
        SCALE,
        lora_init,
        bias=linear.bias is not None,
    )


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_named_linears_are_replaced_where_they_lie_and_the_rest_stays(device: str):
    model = build_model(device)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    replaced = replace_linears(model, ("down", "up"), replacement)
    assert list(replaced) == ["first.up", "first.down"]
    assert low_rank_layers(model) == replaced
    assert type(model["head"]) is nn.Linear
    assert {p.device.type for p in model.parameters()} == {device}
    after = {name: p.shape for name, p in model.named_parameters()}
    assert after.items() >= shapes.items()
    assert after.keys() - shapes.keys() == {
        f"first.{name}.lora_{side}" for name in ("up", "down") for side in "ab"
    }


def test_a_target_that_the_model_lacks_is_refused_before_anything_is_replaced():
    model = build_model("cpu")
    with pytest.raises(
        ConfigError, match=r"no linear layer called 'norm', 'upp'; it has down, head, up"
    ):
        replace_linears(model, ("up", "norm", "upp"), replacement)
    assert not low_rank_layers(model)


@pytest.mark.parametrize("name", ["cheapest", "factored", "merged", "dense_gradient"])
def test_the_contraction_is_the_one_that_the_configuration_names(name: str):
    num_tokens, rank = 64, 12
    layer = low_rank_layer_for(
        nn.Linear(40, 30, bias=False), LoraConfig(rank=rank, contraction=name), 0.5, lora_init
    )
    chosen = cheapest_contraction(30, 40, rank, num_tokens) if name == "cheapest" else BY_NAME[name]
    x = torch.randn(num_tokens, 40, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == num_flops(chosen, 30, 40, rank, num_tokens)


def test_a_contraction_without_effect_is_an_error():
    with pytest.raises(
        ValueError, match=r"has no effect on training with dropout = 0\.1, which is always factored"
    ):
        LoraConfig(rank=4, dropout=0.1, contraction="merged")


# Large enough that means and variances can be compared with the formulas.
LARGE_OUT, LARGE_IN, LARGE_RANK = 90, 70, 30


def initial_tensors(
    init, shape: tuple[int, int] = (LARGE_OUT, LARGE_IN), rank: int = LARGE_RANK
) -> tuple[Tensor, dict]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer = LowRankLinear(shape[1], shape[0], rank, SCALE, init)
    return weight, layer.initial_tensors(weight.clone(), lambda name: generator_for(3, name))


@pytest.mark.parametrize("init", [lora_init, balanced_init])
@pytest.mark.parametrize(
    ("shape", "rank"), [((7, 5), 3), ((5, 11), 4), ((LARGE_OUT, LARGE_IN), LARGE_RANK)]
)
def test_the_layer_starts_as_the_plain_one(init, shape: tuple[int, int], rank: int):
    weight, tensors = initial_tensors(init, shape, rank)
    assert tensors["lora_a"].shape == (rank, shape[1])
    assert tensors["lora_b"].shape == (rank, shape[0])
    merged = tensors["weight"] + SCALE * tensors["lora_b"].T @ tensors["lora_a"]
    # W - s B A + s B A in fp32, terms of order 1.
    torch.testing.assert_close(merged, weight, rtol=0, atol=2e-6)


def test_lora_starts_with_b_zero_a_uniform_and_the_weight_untouched():
    weight, tensors = initial_tensors(lora_init)
    assert torch.equal(tensors["weight"], weight)
    assert not tensors["lora_b"].any()
    check_uniform(tensors["lora_a"], std=1 / math.sqrt(3 * LARGE_IN))


def test_balanced_factors_have_the_published_deviations():
    _, tensors = initial_tensors(balanced_init)
    gain = 3**-0.5
    check_uniform(
        tensors["lora_a"], std=(LARGE_RANK * LARGE_OUT**0.5 / LARGE_IN**1.5) ** 0.25 * gain**0.5
    )
    check_uniform(
        tensors["lora_b"], std=(LARGE_RANK / (LARGE_IN * LARGE_OUT) ** 0.5) ** 0.25 * gain**0.5
    )


def check_uniform(values: Tensor, std: float) -> None:
    """Zero mean, the deviation of `std`, and bounds at sqrt(3) times that."""
    count = values.numel()
    # Five standard errors: std / sqrt(n) of the mean, std^2 sqrt(0.8 / n) of a uniform's variance.
    assert abs(values.mean().item()) < 5 * std / math.sqrt(count)
    assert values.var().item() == pytest.approx(std**2, rel=5 * math.sqrt(0.8 / count))
    bound = math.sqrt(3) * std
    assert 0.98 * bound < values.abs().max().item() <= bound * (1 + 1e-6)


@pytest.mark.parametrize("init", [lora_init, balanced_init])
def test_factors_depend_on_their_generators_alone(init):
    _, first = initial_tensors(init)
    torch.rand(3)
    _, second = initial_tensors(init)
    assert all(torch.equal(first[name], second[name]) for name in first)
    if init is balanced_init:
        assert not torch.equal(first["lora_a"].flatten()[:100], first["lora_b"].flatten()[:100])


@pytest.mark.parametrize(
    ("method", "init"),
    [("lora", "lora"), ("lora", "balanced"), ("switchlora", "switchlora"), ("switchlora", "lora")],
)
def test_every_init_of_every_method_keeps_the_plain_function(method: str, init: str):
    config = METHODS[method].config_type(
        name=method, rank=3, alpha=2.0, init=init, targets=("proj",)
    )
    model = torch.nn.ModuleDict({"proj": torch.nn.Linear(5, 7, bias=False)})
    weight = model["proj"].weight.detach().clone()
    METHODS.build(config, 10, seed=0).prepare_model(model)
    layer = model["proj"]
    assert isinstance(layer, Reparametrized)
    tensors = layer.initial_tensors(weight, lambda name: generator_for(1, name))
    assert tensors.keys() == {
        name for name, _ in (*layer.named_parameters(), *layer.named_buffers())
    }
    layer.load_state_dict(tensors)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(6))
    # fp32, terms of order 1.
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=0, atol=2e-6)

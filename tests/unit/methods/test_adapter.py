"""Low-rank layers replace linear ones and start with the same function."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.insides import num_flops
from support.optimizer_steps import limit_elements_per_call
from support.small_llama import MODEL, initial_tensors
from support.switchlora_layers import effective_weight
from support.tensors import draw64, filled
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from switchtitan.methods.adapter import rounding
from switchtitan.methods.adapter.contraction import BY_NAME, cheapest_contraction
from switchtitan.methods.adapter.linear import (
    AdapterLinear,
    adapter_layers,
    balanced_bounds,
    lora_bounds,
)
from switchtitan.methods.adapter.rounding import FrozenWeights
from switchtitan.methods.lora import Lora, LoraConfig
from switchtitan.models import MODELS
from switchtitan.numerics.random import generator_for

OUT, IN, RANK, SCALE = 7, 5, 3, 0.37
BOUNDS = (0.4, 0.0)


def test_dropout_acts_in_training_on_the_way_into_the_factors_alone():
    dropout = 0.4
    layer = filled(AdapterLinear(IN, OUT, RANK, SCALE, BOUNDS, bias=True, dropout=dropout))
    x = draw64(9, IN)
    torch.manual_seed(5)
    dropped = layer(x)
    torch.manual_seed(5)
    masked = F.dropout(x, dropout)
    expected = F.linear(x, layer.weight, layer.bias)
    expected = expected + SCALE * masked @ layer.lora_a.T @ layer.lora_b
    torch.testing.assert_close(dropped, expected, rtol=1e-12, atol=1e-12)
    layer.eval()
    merged = F.linear(x, effective_weight(layer), layer.bias)
    torch.testing.assert_close(layer(x), merged, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_named_linears_are_replaced_where_they_lie_and_the_rest_stays(device):
    with torch.device(device):
        model = MODELS.build(MODEL)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    Lora(LoraConfig(rank=RANK, targets=("down_proj", "q_proj")), 10, 0).prepare_model(model)
    targets = ("self_attn.q_proj", "mlp.down_proj")
    layers = [f"model.layers.{index}.{target}" for index in range(2) for target in targets]
    assert list(adapter_layers(model)) == layers
    assert {p.device.type for p in model.parameters()} == {device}
    after = {name: p.shape for name, p in model.named_parameters()}
    assert after.items() >= shapes.items()
    factors = {f"{layer}.lora_{side}" for layer in layers for side in "ab"}
    assert after.keys() - shapes.keys() == factors


@pytest.mark.parametrize("name", ["cheapest", *BY_NAME])
def test_the_contraction_is_the_one_that_the_configuration_names(name):
    num_tokens, rank = 64, 12
    config = LoraConfig(rank=rank, contraction=name)
    layer = Lora(config, 10, 0).build_layer("layer", nn.Linear(40, 30, bias=False))
    x = torch.randn(num_tokens, 40, requires_grad=True)
    chosen = cheapest_contraction(x, (30,), rank) if name == "cheapest" else BY_NAME[name]
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == num_flops(chosen, 30, 40, rank, num_tokens)


def test_layers_of_one_input_compute_together_what_they_compute_apart():
    config = LoraConfig(rank=5, alpha=3, contraction="merged")
    layers = [
        filled(Lora(config, 10, 0).build_layer("layer", nn.Linear(12, out)), 10 * out)
        for out in (30, 8, 9)
    ]
    x = draw64(4, 12, seed=9).requires_grad_()
    tensors = [x, *(part for layer in layers for part in (layer.lora_a, layer.lora_b, layer.bias))]
    together = layers[0].forward_together(x, layers[1:])
    apart = [
        F.linear(x, layer.weight + layer.scale * layer.lora_b.T @ layer.lora_a, layer.bias)
        for layer in layers
    ]
    torch.testing.assert_close(list(together), apart)
    grads = [draw64(*out.shape, seed=3) for out in apart]
    torch.testing.assert_close(
        torch.autograd.grad(together, tensors, grads), torch.autograd.grad(apart, tensors, grads)
    )


# Large enough that means and variances can be compared with the formulas.
LARGE = (90, 70, 30)


def tensors_within(bounds):
    out, in_, rank = LARGE
    weight = draw64(out, in_, seed=0).float()
    layer = AdapterLinear(in_, out, rank, SCALE, bounds(out, in_, rank))
    return weight, initial_tensors(layer, weight.clone(), lambda name: generator_for(3, name))


def check_uniform(values, std):
    """Zero mean, the deviation of `std`, and bounds at sqrt(3) times that."""
    count, bound = values.numel(), math.sqrt(3) * std
    # Five standard errors: std / sqrt(n) of the mean, std^2 sqrt(0.8 / n) of a uniform's variance.
    assert abs(values.mean().item()) < 5 * std / math.sqrt(count)
    assert values.var().item() == pytest.approx(std**2, rel=5 * math.sqrt(0.8 / count))
    assert 0.98 * bound < values.abs().max().item() <= bound * (1 + 1e-6)


def test_lora_starts_with_b_zero_a_uniform_and_the_weight_untouched():
    weight, tensors = tensors_within(lora_bounds)
    assert torch.equal(tensors["weight"], weight)
    assert not tensors["lora_b"].any()
    check_uniform(tensors["lora_a"], std=1 / math.sqrt(3 * LARGE[1]))


def test_balanced_factors_have_the_published_deviations():
    _, tensors = tensors_within(balanced_bounds)
    (out, in_, rank), root_of_gain = LARGE, 3**-0.25
    check_uniform(tensors["lora_a"], std=(rank * out**0.5 / in_**1.5) ** 0.25 * root_of_gain)
    check_uniform(tensors["lora_b"], std=(rank / (in_ * out) ** 0.5) ** 0.25 * root_of_gain)
    assert not torch.equal(tensors["lora_a"].flatten()[:100], tensors["lora_b"].flatten()[:100])
    torch.rand(3)  # another state of the global generator
    assert all(
        torch.equal(tensors_within(balanced_bounds)[1][key], tensors[key]) for key in tensors
    )


def bf16_layers(start):
    """Two layers with s = 0.5 and equal weights."""
    out, in_ = start.shape
    made = {name: AdapterLinear(in_, out, RANK, 0.5, BOUNDS) for name in ("first", "second")}
    for layer in made.values():
        layer.weight.data = start.to(torch.bfloat16, copy=True)
    return made


def test_every_seed_weight_and_event_has_bits_of_its_own_and_always_the_same(monkeypatch):
    start, lora_a, lora_b = draw64(OUT, IN), draw64(2, IN).float(), draw64(2, OUT).float()

    def rounded(seed, number):
        layers = bf16_layers(start)
        weights = FrozenWeights(layers, seed, compile_step=False)
        weights.add_products_(number, [(index, lora_a, lora_b) for index in range(2)])
        return [tuple(layer.weight.flatten().tolist()) for layer in layers.values()]

    places = [(seed, number) for seed in (0, 1) for number in (1, 2, 40_000)]
    drawn = [rounded(*place) for place in places]
    assert len({weight for pair in drawn for weight in pair}) == 2 * len(places)
    limit_elements_per_call(monkeypatch, rounding, 2 * IN)  # rows in parts
    assert [rounded(*place) for place in places] == drawn

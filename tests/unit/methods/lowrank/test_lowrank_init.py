"""A low-rank layer starts as the plain layer, with factors as spread as the formulas say."""

import math

import pytest
import torch
from torch import Tensor

from switchtitan.contracts import Reparametrized
from switchtitan.distributed.seeds import generator_for
from switchtitan.methods import METHODS
from switchtitan.methods.lowrank import balanced_init, lora_init

SCALE = 0.37
OUT, IN, RANK = 90, 70, 30


def initial_tensors(
    init, shape: tuple[int, int] = (OUT, IN), rank: int = RANK
) -> tuple[Tensor, dict]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return weight, init(weight.clone(), rank, SCALE, lambda name: generator_for(3, name))


@pytest.mark.parametrize("init", [lora_init, balanced_init])
@pytest.mark.parametrize(("shape", "rank"), [((7, 5), 3), ((5, 11), 4), ((OUT, IN), RANK)])
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
    check_uniform(tensors["lora_a"], std=1 / math.sqrt(3 * IN))


def test_balanced_factors_have_the_published_deviations():
    _, tensors = initial_tensors(balanced_init)
    gain = 3**-0.5
    check_uniform(tensors["lora_a"], std=(RANK * OUT**0.5 / IN**1.5) ** 0.25 * gain**0.5)
    check_uniform(tensors["lora_b"], std=(RANK / (IN * OUT) ** 0.5) ** 0.25 * gain**0.5)


def check_uniform(values: Tensor, std: float) -> None:
    """Zero mean, the deviation of `std`, and bounds at sqrt(3) times that."""
    count = values.numel()
    # The standard error of the mean is std / sqrt(n), that of a uniform's variance std^2 sqrt(0.8 / n); five of each.
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

"""A product of two factors plus a sparse matrix whose places are random and fixed."""

import math

import pytest
import torch
from support.tiny import full_tensors, tiny_config, tiny_stepper, tiny_trainer
from torch import Tensor, nn

from switchtitan.contracts import Reparametrized
from switchtitan.distributed.initial_draws import plain_value
from switchtitan.distributed.seeds import generator_for
from switchtitan.distributed.world import stop_world
from switchtitan.methods.low_rank import balanced_factors
from switchtitan.methods.sltrain import SPARSE, SparseProductLinear, support
from switchtitan.models import MODELS

CPU = torch.device("cpu")
SHAPES = [(7, 40), (30, 20), (1, 9)]
SEED = 2**62 + 12345


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build_layer(out: int, in_: int, has_bias: bool = False) -> SparseProductLinear:
    layer = SparseProductLinear(nn.Linear(in_, out, bias=has_bias), 3, 0.1, SEED).double()
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed))
    return layer


def sparse_matrix(layer: SparseProductLinear) -> Tensor:
    """Its sparse matrix [out, in], built value by value."""
    columns = support((layer.out_features, layer.in_features), layer.num_per_row, SEED, CPU)
    matrix = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    values = iter(layer.sparse_values)
    for row in range(layer.out_features):
        for column in columns[row].tolist():
            matrix[row, column] = next(values)
    return matrix


@pytest.mark.parametrize(("num_per_row", "in_features"), [(1, 9), (3, 20), (9, 9), (7, 2**20)])
def test_each_part_of_a_row_has_one_place(num_per_row, in_features):
    columns = support((50, in_features), num_per_row, SEED, CPU)
    assert columns.shape == (50, num_per_row)
    for part in range(num_per_row):
        start = part * in_features // num_per_row
        end = (part + 1) * in_features // num_per_row
        assert (columns[:, part] >= start).all()
        assert (columns[:, part] < end).all()


def test_places_are_uniform_and_differ_between_rows_and_seeds():
    num_rows, in_features, num_per_row = 20_000, 24, 3
    columns = support((num_rows, in_features), num_per_row, SEED, CPU)
    counts = torch.bincount(columns.flatten(), minlength=in_features).double()
    expected = num_rows * num_per_row / in_features
    # Chi-squared of 3 * 7 degrees of freedom: mean 21, deviation 6.5.
    assert 4 < ((counts - expected) ** 2 / expected).sum() < 60
    # Next rows, parts and seeds agree by chance in one of eight cases.
    deviation = math.sqrt(1 / 8 * 7 / 8 / num_rows)
    for first, second in (
        (columns[1:, 0], columns[:-1, 0]),
        (columns[:, 1] - 8, columns[:, 0]),
        (support((num_rows, in_features), num_per_row, SEED + 1, CPU)[:, 0], columns[:, 0]),
    ):
        assert abs((first == second).double().mean() - 1 / 8) < 5 * deviation


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_computes_the_sum_and_its_gradients(shape, has_bias):
    layer = build_layer(*shape, has_bias)
    x = draw(2, 4, shape[1], seed=8).double().requires_grad_()
    weight = layer.lora_b.T @ layer.lora_a + sparse_matrix(layer)
    expected = nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    inputs = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x).square().sum(), inputs)
    theirs = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close(ours, theirs)
    assert all(gradient.abs().min() > 0 for gradient in theirs), "each value matters"


def test_a_layer_saves_no_dense_matrix():
    layer = build_layer(30, 20)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(draw(2, 4, 20).double().requires_grad_())
    assert sorted(saved) == sorted([2 * 4 * 20, 3 * 20, 3 * 30, 30 * 2])


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_ranks_get_their_rows_of_the_same_initial_parameters(shape):
    layer = build_layer(*shape)
    assert isinstance(layer, Reparametrized)
    weight = draw(*shape)

    def generator(name: str) -> torch.Generator:
        return generator_for(1, name)

    full = layer.initial_tensors(weight, generator)
    num_values = len(full[SPARSE])
    for first, last in ((0, 2), (2, 3), (3, 3)):
        rows = {"lora_a": range(first, last), "lora_b": range(last), "weight": range(shape[0])}
        part = layer.initial_tensors(weight, generator, {**rows, SPARSE: range(first, num_values)})
        assert torch.equal(part["lora_a"], full["lora_a"][first:last])
        assert torch.equal(part["lora_b"], full["lora_b"][:last])
        assert torch.equal(part[SPARSE], full[SPARSE][first:])


def test_a_run_starts_from_the_plain_weights_where_it_has_a_value(corpora):
    folder = corpora / "sltrain-start"
    config = tiny_config(folder, "sltrain")
    trainer = tiny_trainer(folder, "sltrain")
    trainer.stepper.close()
    tensors = full_tensors(trainer)
    stop_world()
    with torch.device("meta"):
        plain = MODELS.build(config.model)
    layers = {name: m for name, m in plain.named_modules() if isinstance(m, nn.Linear)}
    places = {}
    for layer, linear in layers.items():
        if f"model.{layer}.{SPARSE}" not in tensors:
            continue
        weight = plain_value(plain, config.job.seed, f"{layer}.weight", linear.weight.shape)
        lora_a, lora_b = balanced_factors(weight, 6)
        assert torch.equal(tensors[f"model.{layer}.lora_a"], lora_a)
        assert torch.equal(tensors[f"model.{layer}.lora_b"], lora_b)
        seed = generator_for(config.job.seed, f"{layer}.support").initial_seed()
        num_per_row = round(0.1 * linear.in_features)
        columns = support(tuple(linear.weight.shape), num_per_row, seed, CPU)
        places[layer] = columns
        start = (lora_b.T @ lora_a).gather(1, columns)
        values = tensors[f"model.{layer}.{SPARSE}"].view_as(columns)
        # Rounded to fp32 once, values below 1.
        torch.testing.assert_close(start + values, weight.gather(1, columns), rtol=0, atol=1e-7)
        assert (start - weight.gather(1, columns)).abs().max() > 1e-3
    assert len(places) == 14
    block = "model.layers.{}.self_attn.q_proj"
    assert not torch.equal(places[block.format(0)], places[block.format(1)])


def test_sparse_values_train_at_the_rate_of_the_factors(corpora):
    keys = ("--optimizer.other_lr", "1e-30", "--lr_schedule.warmup_steps", "0")
    stepper = tiny_stepper(tiny_config(corpora / "sltrain-rates", "sltrain", *keys))
    before = {name: p.detach().clone() for name, p in stepper.model.named_parameters()}
    stepper.step()
    moved = {name for name, p in stepper.model.named_parameters() if not p.equal(before[name])}
    stepper.close()
    stop_world()
    assert moved == {name for name in before if "lora_" in name or name.endswith(SPARSE)}

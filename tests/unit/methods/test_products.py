"""Layers without a frozen weight: W = B A, and SLTrain's W = B A + S with S sparse."""

import pytest
import torch
from support.observed import saved_besides
from support.small_llama import draw_model
from support.tensors import draw, filled
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from switchtitan.methods import METHODS
from switchtitan.methods.factors import ProductLinear, balanced_factors
from switchtitan.methods.sltrain import SPARSE, Sltrain, SltrainConfig, SparseProductLinear, support
from switchtitan.numerics.random import generator_for
from switchtitan.optim.adamw import AdamWConfig
from switchtitan.optim.parameters import parameter_groups

RANK = 3
SHAPES = [(7, 5), (5, 5), (5, 9)]
SEED = 2**62 + 12345


def nearest(weight, rank):
    """The best approximation by rank, in float64."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def columns_of(shape, num_per_row, seed=SEED):
    return support(torch.tensor([seed]), *shape, num_per_row)


def product_layer(out, in_, has_bias):
    return filled(ProductLinear(nn.Linear(in_, out, bias=has_bias), RANK))


def sparse_layer(out, in_, has_bias=False, seed=SEED):
    layer = SparseProductLinear(nn.Linear(in_, out, bias=has_bias), RANK, 0.1, seed)
    layer.support_seed.fill_(seed)
    return filled(layer)


def dense_weight(layer):
    """B A + S [out, in] of a layer; row by row, S has its values at `columns_of`."""
    matrix = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    if isinstance(layer, SparseProductLinear):
        columns = columns_of(matrix.shape, layer.num_per_row)
        matrix = matrix.scatter(1, columns, layer.sparse_values.view_as(columns))
    return layer.lora_b.T @ layer.lora_a + matrix


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_balanced_and_their_product_is_the_best_of_its_rank(shape):
    weight = draw(*shape)
    lora_a, lora_b = balanced_factors(weight, RANK)
    assert lora_a.is_contiguous()
    assert lora_b.is_contiguous()
    # Rounded to fp32 once, values of order 1.
    found = lora_b.double().T @ lora_a.double()
    torch.testing.assert_close(found, nearest(weight, RANK), rtol=0, atol=1e-6)
    roots = torch.linalg.svdvals(weight.double())[:RANK].sqrt().float()
    torch.testing.assert_close(lora_a.norm(dim=1), roots)
    torch.testing.assert_close(lora_b.norm(dim=1), roots)


def test_a_weight_of_a_lower_rank_has_factors_that_are_finite():
    weight = draw(7, 1) @ draw(1, 5, seed=1)
    lora_a, lora_b = balanced_factors(weight, RANK)
    assert all(torch.isfinite(factor).all() for factor in (lora_a, lora_b))
    torch.testing.assert_close(lora_b.T @ lora_a, weight, rtol=0, atol=2e-6)


@pytest.mark.parametrize("build", [product_layer, sparse_layer])
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(
    ("shape", "has_bias"), [((7, 40), False), ((30, 20), True), ((1, 9), False), ((5, 5), True)]
)
@pytest.mark.usefixtures("fresh_compiler")
def test_a_layer_computes_its_dense_weight_and_the_gradients(build, is_compiled, shape, has_bias):
    layer = build(*shape, has_bias)
    x = draw(2, 4, shape[1], seed=8).double().requires_grad_()
    inputs = [x, *layer.parameters()]
    expected = nn.functional.linear(x, dense_weight(layer), layer.bias)
    if is_compiled:
        layer.compile(fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
    out, saved = saved_besides(inputs, lambda: layer(x))
    torch.testing.assert_close(out, expected)
    ours = torch.autograd.grad(out.square().sum(), inputs)
    theirs = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close(ours, theirs)
    assert all(gradient.abs().min() > 0 for gradient in theirs), "each value matters"
    if build is sparse_layer:
        assert all(each.numel() == 1 for each in saved), "the seed, if anything"


@pytest.mark.parametrize(("num_per_row", "in_features"), [(1, 9), (3, 20), (9, 9), (7, 2**20)])
def test_each_part_of_a_row_has_one_position(num_per_row, in_features):
    columns = columns_of((50, in_features), num_per_row)
    assert columns.shape == (50, num_per_row)
    for part in range(num_per_row):
        start, end = (edge * in_features // num_per_row for edge in (part, part + 1))
        assert (columns[:, part] >= start).all()
        assert (columns[:, part] < end).all()


def test_positions_do_not_change_between_versions():
    """Otherwise the weights of saved runs would."""
    assert columns_of((2, 1000), 4).tolist() == [[152, 333, 616, 958], [127, 341, 534, 956]]
    assert columns_of((1, 10), 1, seed=0).tolist() == [[8]]


@pytest.mark.usefixtures("fresh_compiler")
def test_layers_with_other_seeds_share_a_graph():
    counter = CompileCounterWithBackend("eager")
    layers = [sparse_layer(30, 20, seed=seed) for seed in (SEED, 7)]
    x, outs = draw(4, 20).double(), []
    for layer in layers:
        layer.compile(fullgraph=True, dynamic=False, backend=counter)
        outs.append(layer(x))
        torch.testing.assert_close(outs[-1], layer.forward(x))
    assert counter.frame_count == 1
    assert not torch.allclose(*outs)


@torch.no_grad()
@pytest.mark.parametrize("method", ["low_rank", "sltrain"])
def test_a_run_starts_from_the_nearest_weights_and_plain_ones_where_it_has_a_value(method):
    density = {"density": 0.2} if method == "sltrain" else {}
    config = METHODS.restore({"name": method, "rank": RANK, **density})
    tensors = draw_model(METHODS.build(config, 10, SEED)).state_dict()
    supports = {}
    for name, drawn in draw_model().named_parameters():
        layer = name.removesuffix(".weight")
        if name in tensors:
            assert torch.equal(tensors[name], drawn), name
            continue
        start = tensors[f"{layer}.lora_b"].T @ tensors[f"{layer}.lora_a"]
        # Rounded to fp32 once, values below 1.
        torch.testing.assert_close(start.double(), nearest(drawn, RANK), rtol=0, atol=1e-6)
        if method == "sltrain":
            seed = generator_for(SEED, f"{layer}.support").initial_seed()
            columns = columns_of(drawn.shape, round(0.2 * drawn.shape[1]), seed)
            supports[layer] = columns
            found = start.gather(1, columns) + tensors[f"{layer}.{SPARSE}"].view_as(columns)
            torch.testing.assert_close(found, drawn.gather(1, columns), rtol=0, atol=1e-6)
    assert len(supports) == (14 if method == "sltrain" else 0)
    if supports:
        block = "model.layers.{}.self_attn.q_proj"
        assert not torch.equal(supports[block.format(0)], supports[block.format(1)])


def test_rate_and_weight_decay_of_the_factors_are_those_of_the_sparse_values():
    section = AdamWConfig(lr=1e-2, other_lr=1e-5, weight_decay=0.1)
    method = Sltrain(SltrainConfig(rank=RANK, density=0.2), 10, 0)
    groups = parameter_groups(section, method.trained_parameters(draw_model(method), section))
    found = {name: (group.lr, group.weight_decay) for group in groups for name in group.parameters}
    for local_name in (SPARSE, "lora_a", "lora_b"):
        assert found[f"model.layers.0.mlp.up_proj.{local_name}"] == (1e-2, 0.1)
    assert found["model.norm.weight"] == (1e-5, 0)

"""A product of two factors plus a sparse matrix with values at fixed random positions."""

import math

import pytest
import torch
from support.tiny import full_tensors, tiny_config, tiny_stepper, tiny_trainer, train_steps
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from switchtitan.contracts import Reparametrized
from switchtitan.distributed.initial_draws import plain_value
from switchtitan.distributed.seeds import generator_for
from switchtitan.distributed.world import stop_world
from switchtitan.errors import ConfigError
from switchtitan.methods.product import balanced_factors
from switchtitan.methods.sltrain import (
    SPARSE,
    Sltrain,
    SltrainConfig,
    SparseProductLinear,
    support,
)
from switchtitan.models import MODELS
from switchtitan.optim.parameters import parameter_groups

SHAPES = [(7, 40), (30, 20), (1, 9)]
SEED = 2**62 + 12345


def columns_of(shape: tuple[int, int], num_per_row: int, seed: int = SEED) -> Tensor:
    return support(shape, num_per_row, torch.tensor([seed]))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build_layer(
    out: int, in_: int, has_bias: bool = False, seed: int = SEED
) -> SparseProductLinear:
    layer = SparseProductLinear(nn.Linear(in_, out, bias=has_bias), 3, 0.1, seed).double()
    layer.support_seed.fill_(seed)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed))
    return layer


def sparse_matrix(layer: SparseProductLinear) -> Tensor:
    """Its sparse matrix [out, in], built value by value."""
    columns = columns_of((layer.out_features, layer.in_features), layer.num_per_row)
    matrix = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    values = iter(layer.sparse_values)
    for row in range(layer.out_features):
        for column in columns[row].tolist():
            matrix[row, column] = next(values)
    return matrix


@pytest.mark.parametrize(("num_per_row", "in_features"), [(1, 9), (3, 20), (9, 9), (7, 2**20)])
def test_each_part_of_a_row_has_one_position(num_per_row, in_features):
    columns = columns_of((50, in_features), num_per_row)
    assert columns.shape == (50, num_per_row)
    for part in range(num_per_row):
        start = part * in_features // num_per_row
        end = (part + 1) * in_features // num_per_row
        assert (columns[:, part] >= start).all()
        assert (columns[:, part] < end).all()


def test_positions_do_not_change_between_versions():
    """Otherwise the weights of saved runs would."""
    assert columns_of((2, 1000), 4).tolist() == [[152, 333, 616, 958], [127, 341, 534, 956]]
    assert columns_of((1, 10), 1, seed=0).tolist() == [[8]]


def test_positions_are_uniform_and_differ_between_rows_and_seeds():
    num_rows, in_features, num_per_row = 20_000, 24, 3
    columns = columns_of((num_rows, in_features), num_per_row)
    counts = torch.bincount(columns.flatten(), minlength=in_features).double()
    expected = num_rows * num_per_row / in_features
    # Chi-squared of 3 * 7 degrees of freedom: mean 21, deviation 6.5.
    assert 4 < ((counts - expected) ** 2 / expected).sum() < 60
    # Next rows, parts and seeds agree by chance in one of eight cases.
    deviation = math.sqrt(1 / 8 * 7 / 8 / num_rows)
    for first, second in (
        (columns[1:, 0], columns[:-1, 0]),
        (columns[:, 1] - 8, columns[:, 0]),
        (columns_of((num_rows, in_features), num_per_row, SEED + 1)[:, 0], columns[:, 0]),
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


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_a_layer_saves_its_inputs_alone(is_compiled):
    layer = build_layer(30, 20)
    if is_compiled:
        layer.compile(fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = draw(2, 4, 20).double().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
    weight = layer.lora_b.T @ layer.lora_a + sparse_matrix(layer)
    ours = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
    theirs = torch.autograd.grad((x @ weight.T).square().sum(), [x, *layer.parameters()])
    torch.testing.assert_close(ours, theirs)
    inputs = {each.untyped_storage().data_ptr() for each in (x, *layer.parameters())}
    others = [each for each in saved if each.untyped_storage().data_ptr() not in inputs]
    assert all(each.numel() == 1 for each in others), "the seed, if anything"
    assert len(saved) > len(others)


class CountSupports(TorchDispatchMode):
    """Counts how often positions are computed."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.switchtitan.support.default
        return func(*args, **(kwargs or {}))


def test_each_pass_computes_the_positions_once():
    layer, x = build_layer(30, 20), draw(2, 4, 20).double().requires_grad_()
    with CountSupports() as of_forward:
        out = layer(x)
    with CountSupports() as of_backward:
        out.sum().backward()
    assert (of_forward.number, of_backward.number) == (1, 1)


@pytest.mark.usefixtures("fresh_compiler")
def test_layers_with_other_seeds_share_a_graph():
    counter = CompileCounterWithBackend("eager")
    layers = [build_layer(30, 20, seed=seed) for seed in (SEED, 7)]
    x = draw(4, 20).double()
    outs = []
    for layer in layers:
        layer.compile(fullgraph=True, dynamic=False, backend=counter)
        outs.append(layer(x))
    assert counter.frame_count == 1
    assert not torch.allclose(*outs)
    for layer, out in zip(layers, outs, strict=True):
        torch.testing.assert_close(out, layer.forward(x))


def test_bf16_rounds_the_weight_once_and_the_product_once():
    layer = build_layer(30, 20)
    weight = layer.lora_b.T @ layer.lora_a + sparse_matrix(layer)
    x = draw(64, 20).double()
    exact = x @ weight.T
    rounded = layer.bfloat16()(x.bfloat16()).double()
    # bf16 has 8 bits. The factors, their product, the sum and x are rounded, each by up to 2^-9.
    assert 2**-10 < (rounded - exact).norm() / exact.norm() < 2**-7
    ours = torch.autograd.grad(rounded.square().sum(), list(layer.parameters()))
    assert all(gradient.dtype == torch.bfloat16 for gradient in ours)


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
        rows |= {SPARSE: range(first, num_values), "support_seed": range(1)}
        part = layer.initial_tensors(weight, generator, rows)
        assert part["support_seed"].tolist() == [SEED]
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
    positions = {}
    for layer, linear in layers.items():
        if f"model.{layer}.{SPARSE}" not in tensors:
            continue
        weight = plain_value(plain, config.job.seed, f"{layer}.weight", linear.weight.shape)
        lora_a, lora_b = balanced_factors(weight, 6)
        assert torch.equal(tensors[f"model.{layer}.lora_a"], lora_a)
        assert torch.equal(tensors[f"model.{layer}.lora_b"], lora_b)
        seed = generator_for(config.job.seed, f"{layer}.support").initial_seed()
        num_per_row = round(0.1 * linear.in_features)
        columns = columns_of(tuple(linear.weight.shape), num_per_row, seed)
        positions[layer] = columns
        start = (lora_b.T @ lora_a).gather(1, columns)
        values = tensors[f"model.{layer}.{SPARSE}"].view_as(columns)
        # Rounded to fp32 once, values below 1.
        torch.testing.assert_close(start + values, weight.gather(1, columns), rtol=0, atol=1e-7)
        assert (start - weight.gather(1, columns)).abs().max() > 1e-3
    assert len(positions) == 14
    block = "model.layers.{}.self_attn.q_proj"
    assert not torch.equal(positions[block.format(0)], positions[block.format(1)])


def test_sparse_values_train_at_the_rate_of_the_factors(corpora):
    keys = ("--optimizer.other_lr", "1e-30", "--lr_schedule.warmup_steps", "0")
    stepper = tiny_stepper(tiny_config(corpora / "sltrain-rates", "sltrain", *keys))
    before = {name: p.detach().clone() for name, p in stepper.model.named_parameters()}
    stepper.step()
    moved = {name for name, p in stepper.model.named_parameters() if not p.equal(before[name])}
    stepper.close()
    stop_world()
    assert moved == {name for name in before if "lora_" in name or name.endswith(SPARSE)}


def test_weight_decay_applies_to_the_factors_and_the_sparse_values(corpora):
    config = tiny_config(corpora / "sltrain-decay", "sltrain", "--optimizer.weight_decay", "0.1")
    with torch.device("meta"):
        model = MODELS.build(config.model)
    method = Sltrain(config.method, 40, 42)
    method.prepare_model(model)
    groups = parameter_groups(config.optimizer, method.trained_parameters(model))
    decay = {name: group.weight_decay for group in groups for name in group.parameters}
    assert decay["model.layers.0.mlp.up_proj.sparse_values"] == 0.1
    assert decay["model.layers.0.mlp.up_proj.lora_a"] == 0.1
    assert decay["model.norm.weight"] == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "scale", "adafactor", "sgd"])
def test_every_optimizer_lowers_the_loss_and_moves_the_sparse_values(corpora, optimizer):
    folder = corpora / f"sltrain-{optimizer}"
    trainer = tiny_trainer(folder, "sltrain", "--optimizer.name", optimizer)
    values = {
        name: parameter.detach().clone()
        for name, parameter in trainer.stepper.model.named_parameters()
        if name.endswith(SPARSE)
    }
    losses = train_steps(trainer, 20)
    trainer.stepper.close()
    assert losses[-1] < losses[0]
    for name, parameter in trainer.stepper.model.named_parameters():
        assert name not in values or not torch.equal(parameter, values[name]), name
    stop_world()


def test_a_dense_sparse_matrix_is_an_error(corpora):
    message = (
        r"\[method\] density = 0.98: expected fewer values than the 20 columns of "
        r"model.layers.0.self_attn.q_proj; use a density of at most 0.95"
    )
    with pytest.raises(ConfigError, match=message):
        tiny_trainer(corpora / "sltrain-dense", "sltrain", "--method.density", "0.98")
    tiny_trainer(corpora / "sltrain-dense", "sltrain", "--method.density", "0.95").stepper.close()
    stop_world()


@pytest.mark.parametrize("in_features", [2, 3, 128, 1001, 2001, 4096, 11008])
def test_the_largest_density_that_an_error_names_is_accepted(in_features):
    shapes = {"q_proj": (in_features, in_features)}
    (problem,) = SltrainConfig(rank=1, density=0.99999, targets=("q_proj",)).check_model(shapes)
    largest = float(problem.partition("at most ")[2].partition(",")[0])
    assert SltrainConfig(rank=1, density=largest, targets=("q_proj",)).check_model(shapes) == []
    assert largest > 1 - 1 / in_features - 1e-3

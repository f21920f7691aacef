"""AdamW and Muon on factors equal those on plain matrices, but for vectors that are held still or
reset."""

from contextlib import nullcontext

import pytest
import torch
from support.small_llama import draw_model
from support.switchlora_layers import (
    are_groups_in_place,
    build_layer,
    build_optimizer,
    build_rule,
    limit_elements_in_cache,
    limit_elements_per_call,
    replace_first_shard,
    step_rule,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from switchtitan.distributed.shards import allocate_adjacent
from switchtitan.methods.lora import Lora, LoraConfig
from switchtitan.methods.lowrank import LowRankLinear
from switchtitan.methods.switchlora import SwitchLora, update
from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.plan import FACTOR_A, FACTOR_B, VectorSpan
from switchtitan.optim import AdamWConfig, TrainedParameter
from switchtitan.optim.muon import Muon, MuonConfig

RANK, NUM_STEPS = 3, 12
BOUNDS = (0.4, 0.0)
FROZEN = [VectorSpan(FACTOR_A, 0, range(1, 2)), VectorSpan(FACTOR_B, 1, range(2, 3))]
# Widths 5, 7 and 4: four factors, four and two.
SHAPES = {"first": (7, 5), "second": (5, 7), "third": (4, 5), "fourth": (4, 7)}
MUON = MuonConfig(lr=0.05, weight_decay=0.3)
ADAMW = AdamWConfig(lr=0.05, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.3)
# Some roundings of parameters of size one. Muon amplifies those of small singular values.
TOLERANCE = {"muon": 1e-5, "adamw": 2e-6}


def build_layers(dtype=torch.float32, is_adjacent=False):
    torch.manual_seed(0)
    layers = {
        name: LowRankLinear(i, o, RANK, 0.5, BOUNDS).to(dtype) for name, (o, i) in SHAPES.items()
    }
    if is_adjacent:
        allocated = allocate_adjacent(factors_of(layers).values(), torch.device("cpu"))
        for layer in layers.values():
            layer._apply(lambda tensor: allocated.get(tensor, tensor))
    for factor in factors_of(layers).values():
        nn.init.normal_(factor)
    return layers


def factors_of(layers):
    """By name: A and B of each layer in turn, as they lie in memory."""
    return {
        f"{name}.{key}": layer.get_parameter(key)
        for name, layer in layers.items()
        for key in ("lora_a", "lora_b")
    }


def clones_of(layers):
    return {
        name: nn.Parameter(factor.detach().clone()) for name, factor in factors_of(layers).items()
    }


def muon_of(config, parameters, compute_dtype=torch.float32):
    trained = [
        TrainedParameter(name, parameter, is_in_block=True, compute_dtype=compute_dtype)
        for name, parameter in parameters.items()
    ]
    return Muon(config, trained, compile_step=False)


def draw_gradients(*sides):
    """Sets equal gradients on all sides, each a dict of parameters by name."""
    for name, parameter in sides[0].items():
        grad = torch.randn_like(parameter)
        for side in sides:
            side[name].grad = grad.clone()


def train_with_muon(optimizer, layers, config=MUON, compute_dtype=torch.float32):
    """Steps the rule and Muon on copies with equal gradients; returns the copies and Muon."""
    theirs = clones_of(layers)
    reference = muon_of(config, theirs, compute_dtype)
    for step in range(NUM_STEPS):
        draw_gradients(factors_of(layers), theirs)
        for side in (optimizer, reference):
            side.set_lr((step + 1) / NUM_STEPS)
        step_rule(optimizer)
        reference.step()
    return theirs, reference.state_dict()


def train_with_adamw(optimizer, layers, config=ADAMW):
    """The same with torch's AdamW."""
    theirs = clones_of(layers)
    keys = config.model_dump(include={"betas", "eps", "weight_decay"})
    reference = torch.optim.AdamW(theirs.values(), **keys)
    for step in range(NUM_STEPS):
        draw_gradients(factors_of(layers), theirs)
        lr_factor = (step + 1) / NUM_STEPS
        optimizer.set_lr(lr_factor)
        reference.param_groups[0]["lr"] = config.lr * lr_factor
        step_rule(optimizer)
        reference.step()
    state = {
        f"{name}.{key}": reference.state[parameter][key]
        for name, parameter in theirs.items()
        for key in ("exp_avg", "exp_avg_sq")
    }
    return theirs, state


def check_equal(layers, optimizer, theirs, state, tolerance):
    for name, factor in factors_of(layers).items():
        torch.testing.assert_close(factor, theirs[name], rtol=0, atol=tolerance)
    ours = optimizer.state_dict()
    assert state.keys() == ours.keys()
    for key, expected in state.items():
        torch.testing.assert_close(ours[key], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "compute_dtype"),
    [
        ({}, torch.float32),
        ({"nesterov": False, "ns_steps": 3}, torch.float32),
        ({"weight_decay": 0.0}, torch.bfloat16),
    ],
)
def test_muon_equals_muon_when_nothing_is_switched(keys, compute_dtype):
    config, layers = MUON.model_copy(update=keys), build_layers()
    optimizer = build_rule(config, layers, compute_dtype=compute_dtype)
    theirs, state = train_with_muon(optimizer, layers, config, compute_dtype)
    check_equal(layers, optimizer, theirs, state, TOLERANCE["muon"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_equals_torchs_when_nothing_is_switched(dtype, weight_decay):
    config = ADAMW.model_copy(update={"weight_decay": weight_decay})
    layers = build_layers(dtype)
    optimizer = build_rule(config, layers)
    theirs, state = train_with_adamw(optimizer, layers, config)
    check_equal(layers, optimizer, theirs, state, 1e-14 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("is_adjacent", [False, True])
@pytest.mark.parametrize("elements_per_call", [1, 2 * RANK * 5, 2**25])
@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_groups_of_any_size_and_place_compute_the_same(
    monkeypatch, rule, elements_per_call, is_adjacent
):
    limit_elements_per_call(monkeypatch, elements_per_call)
    layers = build_layers(is_adjacent=is_adjacent)
    if rule == "adamw":
        optimizer = build_rule(ADAMW, layers)
        theirs, state = train_with_adamw(optimizer, layers)
    else:
        optimizer = build_rule(MUON, layers)
        theirs, state = train_with_muon(optimizer, layers)
    check_equal(layers, optimizer, theirs, state, TOLERANCE[rule])
    if elements_per_call > 1 and rule == "adamw":
        assert is_adjacent == are_groups_in_place(optimizer)


@pytest.mark.parametrize("num_layers", [1, 8, 11])
def test_groups_hold_every_factor_once_and_those_of_one_width_are_equally_many(
    monkeypatch, num_layers
):
    limit_elements_per_call(monkeypatch, 8 * RANK * 7)
    layers = {str(index): LowRankLinear(5, 7, RANK, 0.5, BOUNDS) for index in range(num_layers)}
    layers["other"] = LowRankLinear(11, 5, RANK, 0.5, BOUNDS)  # its B is as wide as their A
    groups = update.Factors(layers).groups()
    assert sorted(factor for group in groups for factor in group) == list(range(2 * len(layers)))
    names = list(factors_of(layers))
    sizes = {}
    for group in groups:
        # A of all layers, then B.
        of_group = [names[factor % len(layers) * 2 + factor // len(layers)] for factor in group]
        (width,) = {factors_of(layers)[name].shape[1] for name in of_group}
        assert len(group) * RANK * width <= 8 * RANK * 7
        sizes.setdefault(width, set()).add(len(group))
    assert all(len(of_width) == 1 for of_width in sizes.values())


def test_adamw_holds_only_the_vectors_still_that_the_mask_names():
    layers = build_layers()
    optimizer = build_rule(ADAMW, layers)
    before = clones_of(layers)
    for factor in factors_of(layers).values():
        factor.grad = torch.ones_like(factor)
    step_rule(optimizer, FROZEN)
    still = {"first.lora_a": [1], "second.lora_b": [2]}
    for name, factor in factors_of(layers).items():
        moved = (factor != before[name]).any(dim=1)
        assert [row for row in range(RANK) if not moved[row]] == still.get(name, [])
    optimizer.zero_grad()
    assert all(factor.grad is None for factor in factors_of(layers).values())


def test_a_shard_that_fsdp_replaces_is_found_again():
    layers = build_layers(is_adjacent=True)
    optimizer = build_rule(ADAMW, layers)
    draw_gradients(factors_of(layers))
    step_rule(optimizer)
    replaced = replace_first_shard(optimizer, value=1.0)
    step_rule(optimizer)
    assert (replaced < 1).all()


@pytest.mark.parametrize(("is_fake", "num_calls"), [(False, 3 + 3), (True, 2)])
def test_fake_tensors_are_updated_as_on_a_gpu(monkeypatch, is_fake, num_calls):
    """Estimates of memory and operations count the kernels of GPUs."""
    widths = []
    limit_elements_in_cache(monkeypatch, 1)
    update_vectors_ = update.update_vectors_

    def update_and_count(vectors, *args, **keys):
        widths.append(vectors.shape[1])
        update_vectors_(vectors, *args, **keys)

    monkeypatch.setattr(update, "update_vectors_", update_and_count)
    with FakeTensorMode() if is_fake else nullcontext():
        layers = {"layer": LowRankLinear(7, 5, RANK, 0.5, BOUNDS)}
        optimizer = build_rule(ADAMW, layers)
        for factor in factors_of(layers).values():
            factor.grad = torch.zeros_like(factor)
        step_rule(optimizer)
    assert len(widths) == num_calls


def test_blocks_in_the_cpus_cache_compute_the_same(monkeypatch):
    torch.manual_seed(0)
    width, num_vectors = 5, 7
    whole = [torch.rand(num_vectors, width) for _ in range(4)]
    whole += [torch.rand(num_vectors, 1) for _ in range(4)]
    blocks = [tensor.clone() for tensor in whole]
    update.update_vectors_(*whole, betas=(0.9, 0.99))
    limit_elements_in_cache(monkeypatch, 3 * width)  # 3, 3 and 1 vectors
    update.update_in_blocks_(*blocks, betas=(0.9, 0.99))
    for found, expected in zip(blocks, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_muon_holds_a_frozen_vector_still_and_moves_the_others_as_if_it_were_not_there():
    layers = build_layers()
    optimizer = build_rule(MUON, layers)
    draw_gradients(factors_of(layers))
    step_rule(optimizer)  # so that there is momentum
    before = clones_of(layers)
    kept = {"first.lora_a": [0, 2], "second.lora_b": [0, 1]}
    smaller = {name: nn.Parameter(before[name].detach()[rows]) for name, rows in kept.items()}
    reference = muon_of(MUON, smaller)
    momenta, state = reference.state_dict(), optimizer.state_dict()
    for name, rows in kept.items():
        momenta[f"{name}.momentum"].copy_(state[f"{name}.momentum"][rows])
    momenta_before = {name: state[f"{name}.momentum"].clone() for name in kept}
    draw_gradients(factors_of(layers))
    for name, rows in kept.items():
        smaller[name].grad = factors_of(layers)[name].grad[rows]
    step_rule(optimizer, FROZEN)
    reference.step()
    for name, factor in factors_of(layers).items():
        stood_still = [row for row in range(RANK) if torch.equal(factor[row], before[name][row])]
        if name not in kept:
            assert stood_still == []
            continue
        (row,) = stood_still
        assert row not in kept[name]
        expected = smaller[name]
        torch.testing.assert_close(factor[kept[name]], expected, rtol=0, atol=TOLERANCE["muon"])
        assert torch.equal(state[f"{name}.momentum"][row], momenta_before[name][row])


def test_a_vector_that_was_reset_moves_as_far_as_the_others():
    """Its momentum is a tenth of theirs or less, but orthogonalized rows are of one size."""
    rank, width = 4, 40
    layers = {"layer": LowRankLinear(width, 50, rank, 0.5, BOUNDS)}
    factor, generator = layers["layer"].lora_a, torch.Generator().manual_seed(0)
    nn.init.zeros_(factor)
    nn.init.zeros_(layers["layer"].lora_b)
    layers["layer"].lora_b.grad = torch.zeros_like(layers["layer"].lora_b)
    optimizer = build_rule(MuonConfig(lr=0.05), layers)
    mean = torch.randn(rank, width, generator=generator)
    for _ in range(60):
        factor.grad = mean + torch.randn(mean.shape, generator=generator)
        step_rule(optimizer)
    optimizer.reset([VectorSpan(FACTOR_A, 0, range(1))], only_momentum=False)
    before = factor.detach().clone()
    factor.grad = mean + torch.randn(mean.shape, generator=generator)
    step_rule(optimizer)
    momenta = optimizer.state_dict()["layer.lora_a.momentum"].norm(dim=1)
    assert momenta[0] < 0.1 * momenta[1:].min()
    distances = (factor.detach() - before).norm(dim=1)
    # Singular values become 0.7 to 1.2.
    assert 0.5 < distances[0] / distances[1:].mean() < 2


@pytest.mark.parametrize("reset_moments", ["counterpart", "momentum", "both", "none"])
@pytest.mark.parametrize("freeze_steps", [0, 2])
def test_momentum_is_reset_for_whom_the_setting_names(reset_moments, freeze_steps):
    """With gradients of one, momentum after a reset is that of the first step."""
    rank = 6
    layer = build_layer(9, 14, rank, 0.5, torch.float32)
    keys = {"interval": rank, "freeze_steps": freeze_steps, "decay": "constant"}
    config = SwitchLoraConfig(rank=rank, reset_moments=reset_moments, **keys)
    optimizer = build_optimizer(config, MuonConfig(lr=0.01), [layer], 20)
    factors = layer.lora_a, layer.lora_b
    for p in range(15):
        before = [factor.detach().clone() for factor in factors]
        for factor in factors:
            factor.grad = torch.ones_like(factor)
        optimizer.step()
        state = optimizer.state_dict()
        switched = {(FACTOR_A, p % rank), (FACTOR_B, (rank // 2 + p) % rank)}
        counterparts = {(FACTOR_B, p % rank), (FACTOR_A, (rank // 2 + p) % rank)}
        reset = {"none": set(), "both": counterparts | switched}.get(reset_moments, counterparts)
        for factor, key in ((FACTOR_A, "lora_a"), (FACTOR_B, "lora_b")):
            for vector in range(rank):
                momentum = state[f"layer0.{key}.momentum"][vector]
                is_frozen = (factor, vector) in counterparts and freeze_steps > 0
                if is_frozen:
                    assert torch.equal(factors[factor][vector], before[factor][vector])
                if (factor, vector) in reset:
                    expected = torch.full_like(momentum, 0.0 if is_frozen else 0.05)
                    torch.testing.assert_close(momentum, expected)
                elif p > 0 and freeze_steps == 0:
                    assert momentum.min() > 0.09  # of two steps or more
    assert not any("vector_steps" in key or "exp_avg" in key for key in state)


@pytest.mark.parametrize("method", [Lora, SwitchLora])
def test_layers_that_are_not_targets_train_with_muon_as_well(method):
    config = {Lora: LoraConfig, SwitchLora: SwitchLoraConfig}[method]
    built = method(config(rank=3, targets=("q_proj",)), 10, 0)
    optimizer = built.build_optimizer(draw_model(built), MUON, compile_step=False)
    names = {name for name in optimizer.state_dict() if "layers.0" in name and "proj" in name}
    assert "model.layers.0.self_attn.k_proj.weight.momentum" in names
    assert "model.layers.0.self_attn.q_proj.lora_b.momentum" in names
    others = {name for name in names if not name.endswith(".momentum")}
    assert not others

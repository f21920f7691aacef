"""Muon on factors compared with Muon on plain matrices, and what freezes and resets do to it."""

import pytest
import torch
from support.switchlora_layers import build_layer, build_optimizer
from support.tiny import tiny_trainer
from torch import nn

from switchtitan.distributed.adjacent import allocate_adjacent
from switchtitan.methods.lowrank import LowRankLinear, lora_init
from switchtitan.methods.switchlora import factor_groups
from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.factor_muon import FactorMuon
from switchtitan.methods.switchlora.schedule import FACTOR_A, FACTOR_B, VectorSpan
from switchtitan.optim import TrainedParameter
from switchtitan.optim.muon import Muon, MuonConfig

RANK, NUM_STEPS = 3, 12
SHAPES = {"first": (7, 5), "second": (4, 11), "third": (5, 7)}
KEYS = {"lr": 0.05, "weight_decay": 0.3}
# Some roundings of parameters of size one. Iterations amplify those of small singular values.
TOLERANCE = 1e-5


def build_layers():
    torch.manual_seed(0)
    layers = {name: LowRankLinear(i, o, RANK, 0.5, lora_init) for name, (o, i) in SHAPES.items()}
    for factor in factors_of(layers).values():
        nn.init.normal_(factor)
    return layers


def factors_of(layers):
    """By name, in the order of the tables: A of all layers, then B of all layers."""
    return {
        f"{name}.{key}": layer.get_parameter(key)
        for key in ("lora_a", "lora_b")
        for name, layer in layers.items()
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


def all_moving(layers):
    return torch.ones(2, len(layers), RANK, dtype=torch.bool)


def draw_gradients(*sides):
    """Sets equal gradients on all sides, each a dict of parameters by name."""
    for name, parameter in sides[0].items():
        grad = torch.randn_like(parameter)
        for side in sides:
            side[name].grad = grad.clone()


@pytest.mark.parametrize(
    ("keys", "compute_dtype", "compile_step"),
    [
        ({}, torch.float32, False),
        ({"nesterov": False, "ns_steps": 3}, torch.float32, False),
        ({"weight_decay": 0.0}, torch.bfloat16, False),
        ({}, torch.float32, True),
    ],
)
def test_equals_muon_when_nothing_is_switched(keys, compute_dtype, compile_step):
    config, layers = MuonConfig(**(KEYS | keys)), build_layers()
    theirs = clones_of(layers)
    optimizer = FactorMuon(config, layers, compute_dtype, compile_step)
    reference = muon_of(config, theirs, compute_dtype)
    start = clones_of(layers)
    for step in range(NUM_STEPS):
        draw_gradients(factors_of(layers), theirs)
        for side in (optimizer, reference):
            side.set_lr((step + 1) / NUM_STEPS)
        optimizer.step(all_moving(layers))
        reference.step()
    for name, factor in factors_of(layers).items():
        torch.testing.assert_close(factor, theirs[name], rtol=0, atol=TOLERANCE)
        assert (factor - start[name]).abs().max() > 1e-2
    state, expected = optimizer.state_dict(), reference.state_dict()
    assert state.keys() == expected.keys()
    for key, momentum in state.items():
        assert momentum.shape == factors_of(layers)[key.removesuffix(".momentum")].shape
        torch.testing.assert_close(momentum, expected[key], rtol=0, atol=1e-6)  # rounding


@pytest.mark.parametrize("is_adjacent", [False, True])
@pytest.mark.parametrize("elements_per_call", [1, 2 * RANK * 5])
def test_groups_of_any_size_and_place_compute_the_same(monkeypatch, elements_per_call, is_adjacent):
    monkeypatch.setattr(factor_groups, "_ELEMENTS_PER_CALL", elements_per_call)
    config, layers = MuonConfig(**KEYS), build_layers()
    theirs = clones_of(layers)
    if is_adjacent:
        allocated = allocate_adjacent(factors_of(layers).values(), torch.device("cpu"))
        for layer in layers.values():
            layer._apply(lambda tensor: allocated.get(tensor, tensor))
        with torch.no_grad():
            for name, factor in factors_of(layers).items():
                factor.copy_(theirs[name])
    optimizer, reference = FactorMuon(config, layers, torch.float32, False), muon_of(config, theirs)
    for _ in range(NUM_STEPS):
        draw_gradients(factors_of(layers), theirs)
        optimizer.step(all_moving(layers))
        reference.step()
    for name, factor in factors_of(layers).items():
        torch.testing.assert_close(factor, theirs[name], rtol=0, atol=TOLERANCE)


def test_a_frozen_vector_keeps_its_value_and_the_others_move_as_if_it_were_not_there():
    config, layers = MuonConfig(**KEYS), build_layers()
    optimizer = FactorMuon(config, layers, torch.float32, False)
    draw_gradients(factors_of(layers))
    optimizer.step(all_moving(layers))  # so that there is momentum
    before = clones_of(layers)
    moving = all_moving(layers)
    moving[FACTOR_A, 0, 1] = moving[FACTOR_B, 1, 2] = False
    kept = {"first.lora_a": [0, 2], "second.lora_b": [0, 1]}
    smaller = {name: nn.Parameter(before[name].detach()[rows]) for name, rows in kept.items()}
    reference = muon_of(config, smaller)
    momenta, state = reference.state_dict(), optimizer.state_dict()
    for name, rows in kept.items():
        momenta[f"{name}.momentum"].copy_(state[f"{name}.momentum"][rows])
    momenta_before = {name: state[f"{name}.momentum"].clone() for name in kept}
    draw_gradients(factors_of(layers))
    for name, rows in kept.items():
        smaller[name].grad = factors_of(layers)[name].grad[rows]
    optimizer.step(moving)
    reference.step()
    for name, factor in factors_of(layers).items():
        stood_still = [row for row in range(RANK) if torch.equal(factor[row], before[name][row])]
        if name not in kept:
            assert stood_still == []
            continue
        assert stood_still == [row for row in range(RANK) if row not in kept[name]]
        torch.testing.assert_close(factor[kept[name]], smaller[name], rtol=0, atol=TOLERANCE)
        # A gradient of zero.
        (row,) = stood_still
        momentum = state[f"{name}.momentum"][row]
        torch.testing.assert_close(momentum, config.momentum * momenta_before[name][row])
    # Shows that the check above can fail: with its row, the others move elsewhere.
    with torch.no_grad():
        for name in kept:
            factors_of(layers)[name].copy_(before[name])
            state[f"{name}.momentum"].copy_(momenta_before[name])
    optimizer.step(all_moving(layers))
    for name, rows in kept.items():
        moved_apart = (factors_of(layers)[name][rows] - smaller[name]).abs().max()
        assert moved_apart > 100 * TOLERANCE


@pytest.mark.parametrize("resets", ["reset", "reset_momentum"])
def test_a_reset_zeroes_the_momentum_of_the_vectors_named(resets):
    layers = build_layers()
    optimizer = FactorMuon(MuonConfig(**KEYS), layers, torch.float32, False)
    draw_gradients(factors_of(layers))
    optimizer.step(all_moving(layers))
    spans = [VectorSpan(FACTOR_A, 0, range(1, 3)), VectorSpan(FACTOR_B, 2, range(1))]
    getattr(optimizer, resets)(spans)
    getattr(optimizer, resets)([])
    for key, momentum in optimizer.state_dict().items():
        zeros = {"first.lora_a.momentum": [1, 2], "third.lora_b.momentum": [0]}.get(key, [])
        assert [row for row in range(RANK) if not momentum[row].any()] == zeros


def test_a_vector_that_was_reset_moves_as_far_as_the_others():
    """Its momentum is a tenth of theirs or less, but orthogonalized rows are of one size."""
    rank, width = 4, 40
    layers = {"layer": LowRankLinear(width, 50, rank, 0.5, lora_init)}
    factor, generator = layers["layer"].lora_a, torch.Generator().manual_seed(0)
    nn.init.zeros_(factor)
    nn.init.zeros_(layers["layer"].lora_b)
    optimizer = FactorMuon(MuonConfig(lr=0.05), layers, torch.float32, False)
    mean = torch.randn(rank, width, generator=generator)
    moving = torch.ones(2, 1, rank, dtype=torch.bool)
    layers["layer"].lora_b.grad = torch.zeros_like(layers["layer"].lora_b)
    for _ in range(100):
        factor.grad = mean + torch.randn(mean.shape, generator=generator)
        optimizer.step(moving)
    optimizer.reset([VectorSpan(FACTOR_A, 0, range(1))])
    before = factor.detach().clone()
    factor.grad = mean + torch.randn(mean.shape, generator=generator)
    optimizer.step(moving)
    momenta = optimizer.state_dict()["layer.lora_a.momentum"].norm(dim=1)
    assert momenta[0] < 0.1 * momenta[1:].min()
    distances = (factor.detach() - before).norm(dim=1)
    # Singular values become 0.7 to 1.2.
    assert 0.5 < distances[0] / distances[1:].mean() < 2


def test_state_returns_by_name():
    config, layers, others = MuonConfig(**KEYS), build_layers(), build_layers()
    optimizer = FactorMuon(config, layers, torch.float32, False)
    resumed = FactorMuon(config, others, torch.float32, False)
    for _ in range(2):
        draw_gradients(factors_of(layers), factors_of(others))
        optimizer.step(all_moving(layers))
    state = {key: momentum.clone() for key, momentum in optimizer.state_dict().items()}
    resumed.load_state_dict(state | {"other": torch.zeros(1)})
    for key, momentum in resumed.state_dict().items():
        assert torch.equal(momentum, state[key])
    assert {key.rpartition(".")[0] for key in state} == factors_of(layers).keys()
    optimizer.zero_grad()
    assert all(factor.grad is None for factor in factors_of(layers).values())
    assert all(factor.grad is not None for factor in factors_of(others).values())


@pytest.mark.parametrize("reset_moments", ["counterpart", "momentum", "both", "none"])
@pytest.mark.parametrize("freeze_steps", [0, 2])
def test_momentum_is_reset_for_whom_the_setting_names(reset_moments, freeze_steps):
    """With gradients of one, momentum after a reset is that of the first step."""
    rank = 6
    layer = build_layer(9, 14, rank, 0.5, torch.float32)
    config = SwitchLoraConfig(
        rank=rank,
        interval=rank,
        freeze_steps=freeze_steps,
        decay="constant",
        reset_moments=reset_moments,
    )
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


@pytest.mark.parametrize("method", ["lora", "switchlora"])
def test_layers_that_are_not_targets_train_with_muon_as_well(corpora, method):
    keys = ("--method.targets", "q_proj", "--optimizer.name", "muon")
    trainer = tiny_trainer(corpora / f"targets-{method}", method, *keys)
    names = {name for name in trainer.stepper.optimizer.state_dict() if "layers.0" in name}
    trainer.stepper.close()
    assert "model.layers.0.self_attn.k_proj.weight.momentum" in names
    assert not [name for name in names if "proj" in name and not name.endswith(".momentum")]

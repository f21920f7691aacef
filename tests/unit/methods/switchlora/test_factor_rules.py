"""AdamW and Muon on factors equal those on plain matrices, but for vectors that are held still or
reset."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from support.small_llama import draw_model
from support.switchlora_layers import build_layer, build_optimizer, build_rule, step_rule
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from switchtitan.distributed.fsdp import cast_trained
from switchtitan.methods.adapter.linear import AdapterLinear
from switchtitan.methods.lora import Lora, LoraConfig
from switchtitan.methods.switchlora import SwitchLora, update
from switchtitan.methods.switchlora.plan import FACTOR_A, FACTOR_B, SwitchLoraConfig
from switchtitan.optim import OPTIMIZERS
from switchtitan.optim.adamw import AdamWConfig
from switchtitan.optim.adamw8bit import AdamW8bitConfig
from switchtitan.optim.muon import Muon8bitConfig, MuonConfig
from switchtitan.optim.parameters import TrainedParameter

RANK, NUM_STEPS = 3, 12
BOUNDS = (0.4, 0.0)
FROZEN = [(FACTOR_A, 0, range(1, 2)), (FACTOR_B, 1, range(2, 3))]
# Widths 5, 7 and 4: four factors, four and two.
SHAPES = {"first": (7, 5), "second": (5, 7), "third": (4, 5), "fourth": (4, 7)}
MUON = MuonConfig(lr=0.05, weight_decay=0.3)
ADAMW = AdamWConfig(lr=0.05, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.3)
# Some roundings of parameters of size one. Muon amplifies those of small singular values.
TOLERANCE = {"muon": 1e-5, "adamw": 2e-6}


def build_layers():
    torch.manual_seed(0)
    layers = {name: AdapterLinear(i, o, RANK, 0.5, BOUNDS) for name, (o, i) in SHAPES.items()}
    for factor in factors_of(layers).values():
        nn.init.normal_(factor)
    return layers


def factors_of(layers):
    """By name: A and B of each layer in turn."""
    return {
        f"{name}.{key}": layer.get_parameter(key)
        for name, layer in layers.items()
        for key in ("lora_a", "lora_b")
    }


def clones_of(layers):
    return {
        name: nn.Parameter(factor.detach().clone()) for name, factor in factors_of(layers).items()
    }


def plain_optimizer(config, parameters):
    trained = [TrainedParameter(*item, is_in_block=True) for item in parameters.items()]
    return OPTIMIZERS.build(config, trained, False)


def draw_gradients(*sides):
    """Sets equal gradients on all sides, each a dict of parameters by name."""
    for name, parameter in sides[0].items():
        grad = torch.randn(parameter.shape)
        for side in sides:
            side[name].grad = grad.to(side[name].dtype, copy=True)


@pytest.mark.parametrize(
    "config",
    [
        ADAMW,
        ADAMW.model_copy(update={"weight_decay": 0.0}),
        MUON,
        MUON.model_copy(update={"nesterov": False, "ns_steps": 3, "weight_decay": 0.0}),
    ],
)
def test_a_rule_equals_adamw_or_muon(config):
    layers = build_layers()
    optimizer, theirs = build_rule(config, layers), clones_of(layers)
    reference = plain_optimizer(config, theirs)
    for step in range(NUM_STEPS):
        draw_gradients(factors_of(layers), theirs)
        for each in (optimizer, reference):
            each.set_lr((step + 1) / NUM_STEPS)
        step_rule(optimizer)
        reference.step()
    for name, factor in factors_of(layers).items():
        torch.testing.assert_close(factor, theirs[name], rtol=0, atol=TOLERANCE[config.name])
    state, expected = optimizer.state_dict(), reference.state_dict()
    assert state.keys() == {key for key in expected if not key.endswith(".step")}
    for key, tensor in state.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("is_fake", "num_calls"), [(False, 2), (True, 1)])
def test_fake_tensors_are_updated_as_on_a_gpu(monkeypatch, is_fake, num_calls):
    """Estimates of memory and operations count the kernels of GPUs."""
    calls = []
    monkeypatch.setattr(update, "update_", lambda *args, **keys: calls.append(args))
    with FakeTensorMode() if is_fake else nullcontext():
        layers = {"layer": AdapterLinear(5, 5, RANK, 0.5, BOUNDS)}
        optimizer = build_rule(ADAMW, layers)
        for factor in factors_of(layers).values():
            factor.grad = torch.zeros_like(factor)
        step_rule(optimizer)
    assert len(calls) == num_calls


def test_muon_holds_a_frozen_vector_still_and_moves_the_others_as_if_it_were_not_there():
    layers = build_layers()
    optimizer, start = build_rule(MUON, layers), clones_of(layers)
    rows = {name: [0, 1, 2] for name in start} | {"first.lora_a": [0, 2], "second.lora_b": [0, 1]}
    held = {name: [row for row in range(RANK) if row not in rows[name]] for name in rows}
    smaller = {name: nn.Parameter(start[name].detach()[rows[name]]) for name in start}
    state = optimizer.state_dict()
    for name in held:  # of before it was frozen, with reset_moments = "none"
        state[f"{name}.momentum"][held[name]] = 7.0
    reference = plain_optimizer(MUON, smaller)
    for _ in range(3):
        draw_gradients(factors_of(layers))
        for name, factor in factors_of(layers).items():
            smaller[name].grad = factor.grad[rows[name]]
        step_rule(optimizer, FROZEN)
        reference.step()
    for name, factor in factors_of(layers).items():
        expected = smaller[name]
        torch.testing.assert_close(factor[rows[name]], expected, rtol=0, atol=TOLERANCE["muon"])
        assert torch.equal(factor[held[name]], start[name][held[name]])
        assert (state[f"{name}.momentum"][held[name]] == 7.0).all()


IN_8_BITS = {
    "adamw8bit": (AdamW8bitConfig(**ADAMW.model_dump(exclude={"name"})), ADAMW),
    "muon8bit": (Muon8bitConfig(**MUON.model_dump(exclude={"name"})), MUON),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", IN_8_BITS)
def test_with_a_small_state_vectors_stay_close_to_those_of_fp32(name, dtype):
    frozen = [(FACTOR_A, 0, range(3, 5))]
    results, start = [], None
    for config in IN_8_BITS[name]:
        torch.manual_seed(0)
        layers = {"layer": build_layer(128, 64, 64, 0.5, torch.float32)}
        cast_trained(layers["layer"], dtype if config.name in IN_8_BITS else torch.float32)
        optimizer, start = build_rule(config, layers), clones_of(layers)
        for step in range(NUM_STEPS):
            draw_gradients(factors_of(layers))
            step_rule(optimizer, frozen if step == NUM_STEPS - 1 else ())
            if step == NUM_STEPS - 2:
                before = {key: value.clone() for key, value in optimizer.state_dict().items()}
                held = layers["layer"].lora_a[3:5].clone()
        assert torch.equal(layers["layer"].lora_a[3:5], held)
        results.append(factors_of(layers))
        for key, value in optimizer.state_dict().items():
            if "lora_a.momentum" in key or "lora_a.low_bits" in key:  # AdamW's moments decay
                assert torch.equal(value[3:5], before[key][3:5])
                assert not torch.equal(value, before[key])
    for key, in_8_bits in results[0].items():
        exact = results[1][key]
        # A code has 3 to 7 bits of mantissa: a few per cent of each update.
        error = (in_8_bits - exact).norm() / (exact - start[key]).norm()
        assert 0 < error < 0.05, key


@pytest.mark.parametrize("name", IN_8_BITS)
def test_a_reset_zeroes_moments_in_8_bits(name):
    layer = build_layer(128, 128, 64, 0.5, torch.float32)
    keys = {"interval": 64, "freeze_steps": 1, "decay": "constant"}
    config = SwitchLoraConfig(rank=64, reset_moments="both", **keys)
    optimizer = build_optimizer(config, IN_8_BITS[name][0], [layer], 20)
    for _ in range(3):
        for factor in (layer.lora_a, layer.lora_b):
            factor.grad = torch.ones_like(factor)
        optimizer.step()
    zero = [
        {row for row in range(64) if not scale[row].any()}
        for key, scale in optimizer.state_dict().items()
        if key.endswith(".scale") and "lora" in key
    ]
    # The counterparts of the last step's vectors were reset, and are frozen.
    assert [len(rows) for rows in zero] == [1] * (2 if "muon" in name else 4)


@pytest.mark.parametrize("reset_moments", ["counterpart", "momentum", "both", "none"])
@pytest.mark.parametrize("freeze_steps", [0, 2])
def test_momentum_is_reset_for_whom_the_setting_names(reset_moments, freeze_steps):
    """Gradients are one, of which momentum is a running mean; a frozen vector has none."""
    rank = 6
    layer = build_layer(9, 14, rank, 0.5, torch.float32)
    keys = {"interval": rank, "freeze_steps": freeze_steps, "decay": "constant"}
    config = SwitchLoraConfig(rank=rank, reset_moments=reset_moments, **keys)
    optimizer = build_optimizer(config, MuonConfig(lr=0.01), [layer], 20)
    factors = {FACTOR_A: layer.lora_a, FACTOR_B: layer.lora_b}
    momenta, frozen_until = np.zeros((2, rank)), np.zeros((2, rank))
    for p in range(15):
        before = {index: factor.detach().clone() for index, factor in factors.items()}
        for factor in factors.values():
            factor.grad = torch.ones_like(factor)
        optimizer.step()
        switched = [FACTOR_A, FACTOR_B], [p % rank, (rank // 2 + p) % rank]
        counterparts = [FACTOR_B, FACTOR_A], switched[1]
        if reset_moments != "none":
            momenta[counterparts] = 0
        if reset_moments == "both":
            momenta[switched] = 0
        frozen_until[counterparts] = p + freeze_steps
        is_frozen = frozen_until > p
        momenta = np.where(is_frozen, momenta, 0.95 * momenta + 0.05)
        state = optimizer.state_dict()
        for index, key in ((FACTOR_A, "lora_a"), (FACTOR_B, "lora_b")):
            found = state[f"layer0.{key}.momentum"]
            expected = torch.from_numpy(momenta[index]).float()
            torch.testing.assert_close(found, expected[:, None].expand_as(found))
            held = np.flatnonzero(is_frozen[index])
            assert torch.equal(factors[index][held], before[index][held])
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

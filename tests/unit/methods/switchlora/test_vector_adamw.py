"""AdamW per vector compared with torch's AdamW."""

import pytest
import torch

from switchtitan.methods.lowrank import LowRankLinear, lora_init
from switchtitan.methods.switchlora.vector_adamw import VectorAdamW
from switchtitan.optim import AdamWConfig

RANK, NUM_STEPS = 3, 25
SHAPES = {"first": (7, 5), "second": (4, 11)}
# Of parameters of size one: some roundings of each of 25 steps.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6}


def build_layers(dtype):
    torch.manual_seed(0)
    layers = {
        name: LowRankLinear(i, o, RANK, 0.5, lora_init).to(dtype) for name, (o, i) in SHAPES.items()
    }
    for layer in layers.values():
        for factor in (layer.lora_a, layer.lora_b):
            torch.nn.init.normal_(factor)
    return layers


def factors_of(layers):
    return [factor for layer in layers.values() for factor in (layer.lora_a, layer.lora_b)]


def all_moving(layers):
    return torch.ones(2, len(layers), RANK, dtype=torch.bool)


@pytest.mark.parametrize(
    ("dtype", "weight_decay", "compile_step"),
    [
        (torch.float64, 0.0, False),
        (torch.float64, 0.3, False),
        (torch.float32, 0.0, False),
        (torch.float32, 0.3, False),
        (torch.float32, 0.3, True),
    ],
)
def test_equals_torch_adamw_when_nothing_is_switched(dtype, weight_decay, compile_step):
    config = AdamWConfig(lr=0.05, betas=(0.8, 0.97), eps=1e-6, weight_decay=weight_decay)
    layers = build_layers(dtype)
    if compile_step:
        del layers["second"]  # every shape is compiled by itself, for seconds
    optimizer = VectorAdamW(config, layers, compile_step)
    theirs = [factor.detach().clone().requires_grad_() for factor in factors_of(layers)]
    reference = torch.optim.AdamW(
        theirs, lr=0.05, betas=(0.8, 0.97), eps=1e-6, weight_decay=weight_decay
    )
    for step in range(NUM_STEPS):
        lr_factor = (step + 1) / NUM_STEPS
        optimizer.set_lr(lr_factor)
        reference.param_groups[0]["lr"] = 0.05 * lr_factor
        for ours, other in zip(factors_of(layers), theirs, strict=True):
            ours.grad = torch.randn_like(ours)
            other.grad = ours.grad.clone()
        optimizer.step(all_moving(layers))
        reference.step()
    for ours, other in zip(factors_of(layers), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=TOLERANCE[dtype])
    state = optimizer.state_dict()
    for index, (name, factor) in enumerate(
        (name, factor) for name in layers for factor in ("lora_a", "lora_b")
    ):
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                state[f"{name}.{factor}.{key}"],
                reference.state[theirs[index]][key],
                rtol=0,
                atol=TOLERANCE[dtype],
            )
    assert (optimizer.num_steps == NUM_STEPS).all()


def test_only_vectors_held_still_keep_their_value():
    layers = build_layers(torch.float32)
    optimizer = VectorAdamW(AdamWConfig(lr=0.05, weight_decay=0.3), layers, compile_step=False)
    moving = all_moving(layers)
    moving[0, 0, 1] = moving[1, 1, 2] = False  # a vector of the first A, one of the second B
    before = [factor.detach().clone() for factor in factors_of(layers)]
    for factor in factors_of(layers):
        factor.grad = torch.ones_like(factor)
    optimizer.step(moving)
    moved = [(factor != old) for factor, old in zip(factors_of(layers), before, strict=True)]
    expected = [torch.ones_like(mask) for mask in moved]
    expected[0][1] = False
    expected[3][2] = False
    for mask, wanted in zip(moved, expected, strict=True):
        assert torch.equal(mask, wanted)
    assert (optimizer.num_steps == 1).all(), "the count increases while a vector is frozen"


def test_zero_grad_forgets_gradients():
    layers = build_layers(torch.float32)
    optimizer = VectorAdamW(AdamWConfig(lr=0.05), layers, compile_step=False)
    for factor in factors_of(layers):
        factor.grad = torch.ones_like(factor)
    optimizer.zero_grad()
    assert all(factor.grad is None for factor in factors_of(layers))


@pytest.mark.parametrize("num_layers", [1, 8, 11, 12, 20])
def test_chunks_hold_every_factor_once_and_those_of_one_shape_are_equally_many(num_layers):
    layers = {str(index): LowRankLinear(5, 7, RANK, 0.5, lora_init) for index in range(num_layers)}
    layers["other"] = LowRankLinear(
        11, 5, RANK, 0.5, lora_init
    )  # its B has the shape of the others' A
    chunks = VectorAdamW(AdamWConfig(lr=0.05), layers, compile_step=False)._chunks
    held = [factor for chunk in chunks for factor in chunk.factors]
    assert sorted(held) == list(range(2 * (num_layers + 1)))
    sizes: dict[tuple[int, ...], set[int]] = {}
    for chunk in chunks:
        assert len(chunk.factors) <= 8
        sizes.setdefault(chunk.exp_avg[0].shape, set()).add(len(chunk.factors))
        assert len({moments.shape for moments in (*chunk.exp_avg, *chunk.exp_avg_sq)}) == 1
    assert all(len(of_shape) == 1 for of_shape in sizes.values())

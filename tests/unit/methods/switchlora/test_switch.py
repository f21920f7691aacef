"""A switch keeps a layer's output."""

import math

import pytest
import torch
from support.switchlora_layers import (
    build_layer,
    build_optimizer,
    effective_weight,
    relative_change,
    with_interval,
)

from switchtitan.distributed.fsdp import cast_trained
from switchtitan.numerics.fixed_point import pack, steps_of
from switchtitan.optim.adamw import AdamWConfig
from switchtitan.optim.adamw8bit import AdamW8bitConfig

# (out, in, rank): wide, tall and with a rank near the number of candidates
SHAPES = [(5, 7, 2), (23, 14, 9), (31, 64, 30), (64, 48, 13)]


def switching_layer(shape, dtype, seed, num_per_step=1, num_steps=500, alpha=1.0, is_packed=False):
    """A layer whose optimizer only switches: learning rate 0 and gradients of zero."""
    out_features, in_features, rank = shape
    whole = torch.promote_types(dtype, torch.float32)
    layer = build_layer(out_features, in_features, rank, alpha / rank, whole, seed)
    cast_trained(layer, dtype)
    if is_packed:
        layer.weight.data = pack(layer.weight)
    config = with_interval(rank / num_per_step, rank=rank, freeze_steps=0, decay="constant")
    keys = (AdamW8bitConfig if dtype == torch.bfloat16 else AdamWConfig)(lr=1e-3)
    optimizer = build_optimizer(config, keys, [layer], num_steps)
    optimizer.set_lr(0.0)
    for factor in (layer.lora_a, layer.lora_b):
        factor.grad = torch.zeros_like(factor)
    return layer, optimizer


@pytest.mark.parametrize(
    ("dtype", "alpha", "bound"),
    # float64 rounding errors, enlarged by W and s B A that cancel with a large alpha.
    # In fp32 with alpha 1: rounding errors of 6e-8 of each element. Factors in bf16 have more bits.
    [
        (torch.float64, 1.0, 1e-12),
        (torch.float64, 20.0, 1e-12),
        (torch.float32, 1.0, 1e-7),
        (torch.bfloat16, 1.0, 1e-7),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_switch_keeps_the_effective_weight(shape, dtype, alpha, bound):
    for seed in range(3):
        layer, optimizer = switching_layer(shape, dtype, seed, num_per_step=1 + seed, alpha=alpha)
        for _ in range(12):
            before = effective_weight(layer, optimizer)
            factors = [layer.lora_a.clone(), layer.lora_b.clone()]
            optimizer.step()
            assert relative_change(effective_weight(layer, optimizer), before) <= bound
            if optimizer.metrics()["switch/vectors_switched"]:
                assert not torch.equal(layer.lora_a, factors[0])
                assert not torch.equal(layer.lora_b, factors[1])
        assert optimizer.metrics()["switch/vectors_switched_total"] >= 12 * 2


@pytest.mark.parametrize("shape", SHAPES[1::2])
def test_five_hundred_steps_of_switching_keep_the_effective_weight(shape):
    layer, optimizer = switching_layer(shape, torch.float32, seed=1)
    before, frozen_before = effective_weight(layer), layer.weight.clone()
    optimizer.step()
    assert relative_change(layer.weight, frozen_before) > 1e-3, "nothing was folded into W"
    for _ in range(499):
        optimizer.step()
    assert optimizer.metrics()["switch/vectors_switched_total"] == 2 * 500
    # The promise; a random walk of 500 roundings of 6e-8 gives 1e-6.
    assert relative_change(effective_weight(layer), before) <= 1e-5


@pytest.mark.parametrize("num_folds", [400])
def test_weights_of_16_bits_move_by_a_random_walk_of_one_step_each_switch(num_folds):
    layer, optimizer = switching_layer(
        (128, 128, 32), torch.float32, seed=1, num_steps=num_folds, is_packed=True
    )
    before = effective_weight(layer)
    for _ in range(num_folds):
        optimizer.step()
    after, steps = effective_weight(layer), steps_of(layer.weight).double()
    # A rounding has a variance of at most 1 / 4 of a squared step, on average 1 / 6.
    walk = ((after - before) / steps).square().mean().sqrt().item()
    assert walk <= 2 * math.sqrt(num_folds / 6)
    assert relative_change(after, before) <= 0.01

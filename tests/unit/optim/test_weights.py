"""A parameter in bf16 with 8 more bits is updated like one in fp32, up to rounding to 24 bits."""

import pytest
import torch
from support.optimizer_steps import build, parameters, train
from support.tensors import draw

from switchtitan.numerics.split_float import join, split
from switchtitan.optim.adamw8bit import AdamW8bitConfig
from switchtitan.optim.muon import Muon8bitConfig

STEP = 2.0**-15  # of 24 bits, relative to the power of two below a value


def test_both_parts_are_the_value_rounded_to_24_bits_and_to_bf16():
    values = draw(1000, 8) * torch.exp(10 * draw(1000, 8))
    values[0, :3] = torch.tensor([0.0, -0.0, 1e-40])
    high, low = split(values)
    exact = join(high, low)
    assert ((exact - values).abs() <= values.abs() * STEP / 2 + 1e-42).all()
    # Both round to nearest, but a value in the middle of two.
    assert ((high.float() - exact).abs() <= (values.bfloat16().float() - exact).abs()).all()
    words = torch.randint(-(2**31), 2**31, values.shape, dtype=torch.int32)
    assert all(map(torch.equal, split(exact, words), (high, low)))


@pytest.mark.parametrize("section", [AdamW8bitConfig, Muon8bitConfig])
def test_parameters_in_bf16_follow_those_in_fp32_by_the_bits_of_the_optimizer(section):
    shapes = {"layers.0.proj.weight": (64, 96), "layers.0.norm.weight": (96,)}
    before, exact, short = (parameters(shapes, dtype=torch.bfloat16) for _ in range(3))
    for parameter in exact.values():
        parameter.data = parameter.data.float()
    config = section(lr=1e-3, weight_decay=0.1)
    train(build(config, exact), exact, range(12), torch.bfloat16)
    optimizer = build(config, short)
    train(optimizer, short, range(12))
    state = optimizer.state_dict()
    for name, parameter in short.items():
        error = join(parameter.detach(), state[f"{name}.low_bits"]) - exact[name]
        # Twelve roundings to 24 bits, in place of one to 16.
        assert 0 < error.norm() < 12**0.5 * STEP * exact[name].norm()
        assert (parameter - exact[name]).norm() > 20 * error.norm()
        assert (exact[name] - before[name]).norm() > 20 * error.norm()

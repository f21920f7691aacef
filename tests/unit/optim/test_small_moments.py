"""Moments in 8 bits: close to those in fp32, and equal in parts of rows."""

import pytest
import torch
from support.optimizer_steps import build, parameters, train
from support.packages import needs_torchao
from support.tiny import tiny_config

from switchtitan.errors import ConfigError
from switchtitan.optim import AdamWConfig
from switchtitan.optim.adamw8bit import AdamW8bitConfig, block_size

# In 8 bits: blocks of 96 and of 127; too small; a vector.
SHAPES = {"a.weight": (64, 96), "b.weight": (33, 381), "c.weight": (3, 64), "d.weight": (96,)}
KEYS = {"lr": 0.03, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.2}
FP32 = AdamWConfig(**KEYS)


def trained(config, steps):
    """Parameters after some steps, and the optimizer's state."""
    named = parameters(SHAPES)
    optimizer = build(config, named)
    train(optimizer, named, steps)
    return named, optimizer.state_dict()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64, 4096), 256),
        ((64, 5461), 127),
        ((64, 1376), 172),
        ((64, 64), 64),
        ((64, 5449), None),  # a prime
        ((63, 64), None),
        ((8192,), None),
    ],
)
def test_a_block_is_the_largest_divisor_of_a_row(shape, expected):
    assert block_size(shape) == expected


@needs_torchao
def test_parameters_stay_close_to_those_of_fp32_moments_and_state_is_plain():
    before = parameters(SHAPES)
    (named, state), (exact, _) = (
        trained(config, range(12)) for config in (AdamW8bitConfig(**KEYS), FP32)
    )
    for name, parameter in named.items():
        moved = (exact[name] - before[name]).norm()
        in_8_bits = block_size(SHAPES[name]) is not None
        # A code has 3 to 7 bits of mantissa: a few per cent of each update.
        assert (parameter - exact[name]).norm() < (0.05 if in_8_bits else 1e-5) * moved, name
    assert {type(tensor) for tensor in state.values()} == {torch.Tensor}
    assert state["a.weight.exp_avg.codes"].dtype == torch.uint8
    assert state["a.weight.exp_avg.scale"].shape == (64, 1)
    assert state["b.weight.exp_avg_sq.scale"].shape == (33, 3)
    assert state["c.weight.exp_avg"].dtype == torch.float32
    assert all(tensor.any() for tensor in state.values())


def test_without_torchao_the_choice_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("switchtitan.job.checks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"adamw8bit.*torchao"):
        tiny_config(tmp_path, "full_rank", "--optimizer.name", "adamw8bit")

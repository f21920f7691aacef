"""AdamW in 8 bits: torchao's update, blocks inside rows, state as plain tensors."""

import importlib.util

import pytest
import torch
from support.optimizer_steps import parameters, train
from support.packages import needs_torchao
from support.tiny import tiny_config
from torch import Tensor, nn

from switchtitan.benchmark.estimate import estimate_step
from switchtitan.errors import ConfigError
from switchtitan.optim import AdamW, AdamWConfig, TrainedParameter
from switchtitan.optim.adamw8bit import AdamW8bit, AdamW8bitConfig, block_size

pytestmark = pytest.mark.usefixtures("fresh_compiler")

# Blocks of 96 and of 127; too small; a vector.
SHAPES = {"a": (64, 96), "b": (33, 381), "c": (3, 64), "d": (96,)}
KEYS = {"lr": 0.03, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.2}


def build(named: dict[str, nn.Parameter], compile_step: bool = False) -> AdamW8bit:
    trained = [TrainedParameter(*item) for item in named.items()]
    return AdamW8bit(AdamW8bitConfig(**KEYS), trained, compile_step)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64, 4096), 256),
        ((64, 5461), 127),
        ((64, 2736), 228),
        ((64, 1376), 172),
        ((64, 64), 64),
        ((64, 63), None),
        ((64, 5449), None),  # a prime
        ((63, 64), None),
        ((8192,), None),
    ],
)
def test_a_block_is_the_largest_divisor_of_a_row(shape, expected):
    assert block_size(shape) == expected


@needs_torchao
def test_parameters_stay_close_to_those_of_fp32_moments_and_state_is_plain():
    named, exact, start = parameters(SHAPES), parameters(SHAPES), parameters(SHAPES)
    optimizer = build(named)
    train(optimizer, named, range(12))
    reference = AdamW(AdamWConfig(**KEYS), [TrainedParameter(*item) for item in exact.items()])
    train(reference, exact, range(12))
    for name, parameter in named.items():
        moved = (exact[name] - start[name]).norm()
        in_8_bits = block_size(SHAPES[name]) is not None
        # A code has 3 to 7 bits of mantissa: a few per cent of each update.
        assert (parameter - exact[name]).norm() < (0.05 if in_8_bits else 1e-5) * moved, name
    state = optimizer.state_dict()
    assert {type(tensor) for tensor in state.values()} == {Tensor}
    assert state["a.exp_avg.codes"].dtype == torch.uint8
    assert state["a.exp_avg.scale"].shape == (64, 1)
    assert state["b.exp_avg_sq.scale"].shape == (33, 3)
    assert state["c.exp_avg"].dtype == torch.float32
    assert all(tensor.any() for tensor in state.values())


@needs_torchao
@pytest.mark.parametrize("compile_step", [False, pytest.param(True, marks=())])
def test_a_fresh_optimizer_with_the_saved_state_resumes_bitwise(compile_step):
    straight, first = parameters(SHAPES), parameters(SHAPES)
    train(build(straight, compile_step), straight, range(6))
    optimizer = build(first, compile_step)
    train(optimizer, first, range(3))
    copies = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in first.items()}
    fresh = build(copies, compile_step)
    fresh.load_state_dict({key: tensor.clone() for key, tensor in optimizer.state_dict().items()})
    train(fresh, copies, range(3, 6))
    for name, expected in straight.items():
        assert torch.equal(copies[name], expected), name


def test_without_torchao_the_choice_is_refused_before_any_work(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchao" else find_spec(name)
    )
    with pytest.raises(ConfigError, match=r"adamw8bit.*pip install 'switchtitan\[torchao\]'"):
        tiny_config(tmp_path, "full_rank", "--optimizer.name", "adamw8bit")


@needs_torchao
def test_an_estimate_counts_one_byte_for_each_element_and_the_scales(tmp_path):
    keys = ("--optimizer.name", "adamw8bit", "--model.hidden_size", "128")
    config = tiny_config(tmp_path, "full_rank", *keys, "--model.intermediate_size", "256")
    most = estimate_step(config, 1).memory.most
    # Parameters in fp32 take four bytes. Of two moments, codes take two of them, and a scale for
    # each block of 128 or 256 another 16th at most; norms and tables are small.
    assert 0.5 < most["optimizer"] / most["trained"] < 0.55

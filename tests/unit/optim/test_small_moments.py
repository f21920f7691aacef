"""Moments in bf16 and in 8 bits: close to those in fp32, unbiased, and equal in parts of rows."""

import importlib.util

import pytest
import torch
from support.optimizer_steps import draw, limit_elements_per_call, parameters, rounding_keys, train
from support.packages import needs_torchao
from support.tiny import tiny_config

from switchtitan.errors import ConfigError
from switchtitan.optim import OPTIMIZERS, AdamWConfig, TrainedParameter, rounded_moments
from switchtitan.optim.adamw8bit import AdamW8bitConfig, block_size
from switchtitan.optim.rounded_moments import RoundedUpdate, update_and_round_

# In 8 bits: blocks of 96 and of 127; too small; a vector.
SHAPES = {"a.weight": (64, 96), "b.weight": (33, 381), "c.weight": (3, 64), "d.weight": (96,)}
KEYS = {"lr": 0.03, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.2}
FP32, BF16 = AdamWConfig(**KEYS), AdamWConfig(**KEYS, moments_dtype="bfloat16")
UPDATE = {"weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}


def trained(config, steps, seed=0):
    """Parameters after some steps, and the optimizer's state."""
    named = parameters(SHAPES)
    entries = [TrainedParameter(*item) for item in named.items()]
    optimizer = OPTIMIZERS.build(config, entries, False, seed)
    train(optimizer, named, steps)
    return named, optimizer.state_dict()


def test_the_first_update_is_that_of_fp32_moments_and_later_ones_are_close():
    before = parameters(SHAPES)
    for num_steps, tolerance in ((1, 1e-6), (12, 1e-2)):
        (named, state), (exact, _) = (trained(each, range(num_steps)) for each in (BF16, FP32))
        for name, parameter in named.items():
            # The first update uses moments before they are rounded. Later, each of 11 updates of at
            # most 0.03 is off by at most a few times 2^-8.
            torch.testing.assert_close(parameter, exact[name], rtol=0, atol=tolerance)
            assert (parameter - before[name]).abs().max() > 1e-3
    assert {tensor.dtype for key, tensor in state.items() if "exp_avg" in key} == {torch.bfloat16}


@pytest.mark.parametrize("max_elements", [1, 200, 1 << 24])
def test_the_update_of_a_part_of_the_rows_is_that_part_of_the_update(max_elements, monkeypatch):
    limit_elements_per_call(monkeypatch, rounded_moments, max_elements)
    (value, *_), (grad, *_) = draw({"a.weight": (5, 7)}, 1), draw({"a.weight": (5, 7)}, 2)
    full, parts = (
        [value.clone(), grad, grad.bfloat16(), grad.square().bfloat16()] for _ in range(2)
    )
    num_steps = torch.tensor(7.0)
    update = RoundedUpdate({"a.weight": value}, (0.9, 0.999), 1e-8, seed=3, compile_step=False)
    update("a.weight", *full, num_steps, lr=0.03, weight_decay=0.0)
    for rows in (slice(0, 2), slice(2, 5)):
        tensors = [tensor[rows] for tensor in parts]
        (key,) = rounding_keys(update)
        update_and_round_(*tensors, num_steps, key, 0.03, first_row=rows.start, **UPDATE)
    assert all(map(torch.equal, full, parts))


def test_rounding_repeats_for_a_seed_and_differs_between_seeds_names_and_steps():
    states = [trained(BF16, range(3), seed)[1] for seed in (0, 0, 1)]
    once, again, other = states
    assert all(torch.equal(again[key], tensor) for key, tensor in once.items())
    assert not torch.equal(once["a.weight.exp_avg"], other["a.weight.exp_avg"])
    update = RoundedUpdate(parameters(SHAPES), (0.8, 0.97), 1e-6, seed=0, compile_step=False)
    keys = rounding_keys(update)
    assert len({int(key) for key in keys}) == len(SHAPES)
    decided = []
    for num_steps in (1.0, 2.0):
        value, square = torch.zeros(64, 64), torch.full((64, 64), 1.0 + 2**-9)
        moments = [torch.zeros(64, 64, dtype=torch.bfloat16) for _ in range(2)]
        step_keys = {"weight_decay": 0.0, "betas": (0.0, 0.0), "eps": 1.0}
        count = torch.tensor(num_steps)
        update_and_round_(value, square, *moments, count, keys[0], 0.0, first_row=0, **step_keys)
        decided.append(moments[0])
    assert (decided[0] != decided[1]).any()


def follow_average(num_steps, is_nearest):
    """Second moments, started at 1, after `num_steps` steps with squared gradients of 1.5."""
    shape, key = (256, 256), torch.tensor(12345, dtype=torch.int32)
    moment, grad = torch.ones(shape, dtype=torch.bfloat16), torch.full(shape, 1.5**0.5)
    for step in range(num_steps):
        if is_nearest:
            moment.copy_(moment.float() * 0.999 + 0.001 * grad.square())
            continue
        value, mean = torch.zeros(shape), torch.zeros(shape, dtype=torch.bfloat16)
        count = torch.tensor(step + 1.0)
        update_and_round_(value, grad, mean, moment, count, key, 0.0, first_row=0, **UPDATE)
    return moment


def test_small_changes_of_the_second_moment_are_kept_in_the_mean_and_lost_by_nearest_rounding():
    num_steps = 100
    exact = 1.5 - 0.5 * 0.999**num_steps
    # A rounding moves at most 2^-7, with a standard deviation of half that at most. Over 100 steps
    # and 2^16 elements: 0.0039 * 10 / 256, of which five.
    mean = follow_average(num_steps, is_nearest=False).double().mean()
    assert mean == pytest.approx(exact, abs=8e-4)
    # Each step changes 1 by at most 0.0005, and half a unit in the last place is 0.0039.
    assert (follow_average(num_steps, is_nearest=True) == 1).all()


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
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchao" else find_spec(name)
    )
    with pytest.raises(ConfigError, match=r"adamw8bit.*torchao"):
        tiny_config(tmp_path, "full_rank", "--optimizer.name", "adamw8bit")

"""Moments in bf16 are unbiased, do not depend on sharding, and repeat for a seed, name and step."""

import pytest
import torch
from support.optimizer_steps import draw, parameters, train
from torch import Tensor, nn

from switchtitan.optim import AdamW, AdamWConfig, TrainedParameter, rounded_moments
from switchtitan.optim.rounded_moments import RoundedUpdate, update_and_round_

pytestmark = pytest.mark.usefixtures("fresh_compiler")

SHAPES = {"a.weight": (5, 7), "b.weight": (3,), "c.weight": (11, 2), "d.weight": (5, 7)}
KEYS = {"lr": 0.03, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.2, "decay_norms": True}
BF16, FP32 = AdamWConfig(**KEYS, moments_dtype="bfloat16"), AdamWConfig(**KEYS)


def build(
    config: AdamWConfig, named: dict[str, nn.Parameter], compile_step: bool = False, seed: int = 0
) -> AdamW:
    return AdamW(config, [TrainedParameter(*item) for item in named.items()], compile_step, seed)


def test_the_first_update_is_that_of_fp32_moments_and_later_ones_are_close():
    named, exact, start = parameters(SHAPES), parameters(SHAPES), parameters(SHAPES)
    rounded, reference = build(BF16, named), build(FP32, exact)
    for steps, tolerance in ((range(1), 1e-6), (range(1, 12), 1e-2)):
        train(rounded, named, steps)
        train(reference, exact, steps)
        for name, parameter in named.items():
            # The first update uses moments before they are rounded. Later, each of 11 updates of at
            # most 0.03 is off by at most a few times 2^-8.
            torch.testing.assert_close(parameter, exact[name], rtol=0, atol=tolerance)
            assert (parameter - start[name]).abs().max() > 1e-3
    state = rounded.state_dict()
    assert {tensor.dtype for key, tensor in state.items() if "exp_avg" in key} == {torch.bfloat16}


@pytest.mark.parametrize("max_elements", [1, 20, 1 << 24])
def test_the_update_of_a_part_of_the_rows_is_that_part_of_the_update(max_elements, monkeypatch):
    monkeypatch.setattr(rounded_moments, "_MAX_ELEMENTS", max_elements)
    (value, *_), (grad, *_) = draw(SHAPES, 1), draw(SHAPES, 2)
    moments = [grad.bfloat16(), grad.square().bfloat16()]
    full = [value.clone(), grad, *(moment.clone() for moment in moments)]
    parts = [value.clone(), grad, *(moment.clone() for moment in moments)]
    num_steps = torch.tensor(7.0)
    update = RoundedUpdate({"a.weight": value}, (0.8, 0.97), 1e-6, seed=3, compile_step=False)
    update("a.weight", *full, num_steps, lr=0.03, weight_decay=0.2)
    for rows in (slice(0, 2), slice(2, 5)):
        update_and_round_(
            *(tensor[rows] for tensor in parts),
            num_steps,
            update._keys["a.weight"],
            0.03,
            first_row=rows.start,
            weight_decay=0.2,
            betas=(0.8, 0.97),
            eps=1e-6,
        )
    for one, other in zip(full, parts, strict=True):
        assert torch.equal(one, other)


def moments_after(steps: range, seed: int = 0) -> dict[str, Tensor]:
    named = parameters(SHAPES)
    optimizer = build(BF16, named, seed=seed)
    train(optimizer, named, steps)
    return {key: tensor.clone() for key, tensor in optimizer.state_dict().items()}


def test_rounding_repeats_for_a_seed_and_differs_between_seeds_names_and_steps():
    once, again, other = (
        moments_after(range(3)),
        moments_after(range(3)),
        moments_after(range(3), 1),
    )
    assert all(torch.equal(again[key], tensor) for key, tensor in once.items())
    assert not torch.equal(once["a.weight.exp_avg"], other["a.weight.exp_avg"])
    update = RoundedUpdate(parameters(SHAPES), (0.8, 0.97), 1e-6, seed=0, compile_step=False)
    assert len({int(key) for key in update._keys.values()}) == len(SHAPES)
    decided = []
    for num_steps in (1.0, 2.0):
        square = torch.full((64, 64), 1.0 + 2**-9)
        moment = torch.zeros(64, 64, dtype=torch.bfloat16)
        update_and_round_(
            torch.zeros(64, 64), square, moment, moment.clone(), torch.tensor(num_steps),
            update._keys["a.weight"], 0.0, first_row=0, weight_decay=0.0, betas=(0.0, 0.0), eps=1.0,
        )  # fmt: skip
        decided.append(moment)
    assert (decided[0] != decided[1]).any()


def follow_average(num_steps: int, is_nearest: bool) -> Tensor:
    """Second moments, started at 1, after `num_steps` steps with squared gradients of 1.5."""
    shape = (256, 256)
    moment = torch.ones(shape, dtype=torch.bfloat16)
    grad = torch.full(shape, 1.5**0.5)
    key = torch.tensor(12345, dtype=torch.int32)
    for step in range(num_steps):
        if is_nearest:
            moment.copy_(moment.float() * 0.999 + 0.001 * grad.square())
            continue
        update_and_round_(
            torch.zeros(shape), grad, torch.zeros(shape, dtype=torch.bfloat16), moment,
            torch.tensor(step + 1.0), key, 0.0,
            first_row=0, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8,
        )  # fmt: skip
    return moment


def test_small_changes_of_the_second_moment_are_kept_in_the_mean_and_lost_by_nearest_rounding():
    num_steps = 100
    exact = 1.5 - 0.5 * 0.999**num_steps
    # A rounding moves at most 2^-7, with a standard deviation of half that at most. Over 100 steps
    # and 2^16 elements: 0.0039 * 10 / 256, of which five.
    assert follow_average(num_steps, is_nearest=False).double().mean() == pytest.approx(
        exact, abs=8e-4
    )
    # Each step changes 1 by at most 0.0005, and half a unit in the last place is 0.0039.
    assert (follow_average(num_steps, is_nearest=True) == 1).all()


def test_compiled_it_rounds_alike_and_compiles_in_the_first_step_only():
    named, eager = parameters(SHAPES), parameters(SHAPES)
    optimizer, of_eager = build(BF16, named, compile_step=True), build(BF16, eager)
    train(optimizer, named, range(1))
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(optimizer, named, range(1, 12))
    train(of_eager, eager, range(12))
    for name, expected in eager.items():
        # The compiler may fuse a product and a sum into one rounding, so that about one moment in
        # 2^16 rounds differently.
        torch.testing.assert_close(named[name], expected, rtol=1e-4, atol=1e-5)
    for key, tensor in of_eager.state_dict().items():
        assert (optimizer.state_dict()[key] != tensor).sum() <= 1, key


@pytest.mark.parametrize("compile_step", [False, pytest.param(True, marks=())])
def test_a_fresh_optimizer_with_the_saved_state_resumes_bitwise(compile_step):
    straight, first = parameters(SHAPES), parameters(SHAPES)
    train(build(BF16, straight, compile_step), straight, range(6))
    optimizer = build(BF16, first, compile_step)
    train(optimizer, first, range(3))
    copies = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in first.items()}
    fresh = build(BF16, copies, compile_step)
    fresh.load_state_dict({key: tensor.clone() for key, tensor in optimizer.state_dict().items()})
    train(fresh, copies, range(3, 6))
    for name, expected in straight.items():
        assert torch.equal(copies[name], expected), name

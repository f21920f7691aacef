"""Additions to a bf16 weight are unbiased and do not depend on how its rows are sharded."""

import math

import pytest
import torch
from torch import Tensor

from switchtitan.methods.lowrank import LowRankLinear, lora_init
from switchtitan.methods.lowrank.rounding import (
    StochasticRounding,
    add_product_,
)

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def not_finite() -> Tensor:
    """Both infinities; then nan as CUDA makes it, with its sign set, and as the CPU makes it."""
    patterns = [0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFC00000]
    return (
        torch.tensor([pattern - (pattern >> 31 << 32) for pattern in patterns])
        .int()
        .view(torch.float32)
    )


def layers(dtype: torch.dtype, **names_and_shapes: tuple[int, int]) -> dict[str, LowRankLinear]:
    made = {name: LowRankLinear(5, 7, 3, 0.5, lora_init) for name in names_and_shapes}
    for layer in made.values():
        layer.weight.data = layer.weight.data.to(dtype)
    return made


def test_every_seed_weight_and_event_has_bits_of_its_own_and_always_the_same() -> None:
    model = layers(torch.bfloat16, first=(7, 5), second=(7, 5))

    def keys(seed: int, number: int) -> list[int]:
        roundings = StochasticRounding(model, seed, compile_step=False).of_event(number)
        made = [rounding.key for rounding in roundings if rounding is not None]
        assert {key.dtype for key in made} == {torch.int32}
        return [int(key) for key in made]

    places = [(seed, number) for seed in (0, 1) for number in (1, 2, 40_000)]
    drawn = [keys(*place) for place in places]
    assert len({key for pair in drawn for key in pair}) == 2 * len(places)
    assert [keys(*place) for place in places] == drawn


def test_a_weight_of_its_factors_type_is_not_rounded() -> None:
    model = layers(torch.float32, only=(7, 5))
    (rounding,) = StochasticRounding(model, seed=0, compile_step=False).of_event(3)
    assert rounding is None
    weight, left, right = torch.randn(7, 5), torch.randn(7, 2), torch.randn(2, 5)
    expected = weight + 0.5 * left @ right
    add_product_(weight, left, right, 0.5, rounding)
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_compiled_once_it_gives_the_same_bits_for_every_weight_event_and_width() -> None:
    generator = torch.Generator().manual_seed(0)
    model, compiled_model = (layers(torch.bfloat16, first=(7, 5), second=(7, 5)) for _ in range(2))
    for name, layer in model.items():
        layer.weight.copy_(torch.randn(7, 5, generator=generator))
        compiled_model[name].weight.copy_(layer.weight)
    start = model["second"].weight.clone()
    eager, compiled = (
        StochasticRounding(model, 0, False),
        StochasticRounding(compiled_model, 0, True),
    )
    for number in range(4):
        left = torch.randn(7, 1 + number, generator=generator)
        right = 1e-3 * torch.randn(1 + number, 5, generator=generator)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for name, rounding, of_compiled in zip(
                model, eager.of_event(number), compiled.of_event(number), strict=True
            ):
                add_product_(model[name].weight, left, right, 0.25, rounding)
                add_product_(compiled_model[name].weight, left, right, 0.25, of_compiled)
    assert not torch.equal(model["second"].weight, start)
    for name, layer in model.items():
        # The compiler may fuse a multiplication and an addition into one rounding:
        # about one value in 2^16 may round differently.
        assert (compiled_model[name].weight != layer.weight).sum() <= 1
    (rounding, _), weight = compiled.of_event(4), compiled_model["first"].weight
    assert rounding is not None
    with torch._dynamo.config.patch(error_on_recompile=True):
        rounding.add_(weight, not_finite().repeat(7, 1), rounding.key, first_row=0, scale=0.25)
    assert weight[:, :2].tolist() == [[math.inf, -math.inf]] * 7
    assert weight[:, 2:].isnan().all()


def relative_error(kept: Tensor, exact: Tensor) -> float:
    """Of the mean."""
    return ((kept.double() - exact).mean() / exact.mean()).item()


def test_small_changes_keep_the_mean_that_rounding_to_nearest_loses() -> None:
    """The relative error of the mean is at most 1e-7 for one change, 1e-5 after 500."""
    num_changes, out_features, in_features, num_draws = 500, 512, 1024, 16
    generator = torch.Generator().manual_seed(0)
    start = (1 + torch.rand(out_features, in_features, generator=generator)).bfloat16()
    weight, nearest = start.clone(), start.clone()
    model = {"layer": LowRankLinear(4, 3, 1, 1.0, lora_init)}
    model["layer"].weight.data = model["layer"].weight.data.bfloat16()
    rounding = StochasticRounding(model, seed=0, compile_step=False)
    left = torch.rand(out_features, 2, generator=generator)
    right = 4e-6 * torch.rand(2, in_features, generator=generator)
    change = 0.5 * (left.double() @ right.double())
    errors = []
    for number in range(num_changes):
        add_product_(weight, left, right, 0.5, rounding.of_event(number)[0])
        nearest.copy_(nearest.float() + 0.5 * (left @ right))
        if number < num_draws:
            once = start.clone()
            add_product_(once, left, right, 0.5, rounding.of_event(num_changes + number)[0])
            errors.append(relative_error(once, start + change))
    # In one change one value in 8000 moves by 2^-7: a standard deviation of 9e-5. Divided by
    # sqrt(2^19 values), the mean value 1.5 and sqrt(16 draws), this is 2e-8.
    assert abs(sum(errors) / num_draws) <= 1e-7
    assert relative_error(start, start + change) < -5e-7
    # In all one in sixteen moves: 2e-3, over the same.
    exact = start + num_changes * change
    assert abs(relative_error(weight, exact)) <= 1e-5
    assert relative_error(nearest, exact) < -1e-4

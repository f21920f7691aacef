"""Factors are grouped by width."""

import pytest

from switchtitan.methods.lowrank import LowRankLinear, lora_init
from switchtitan.methods.switchlora import factor_groups
from switchtitan.methods.switchlora.factor_groups import FactorGroups

RANK = 3


@pytest.mark.parametrize("num_layers", [1, 8, 11])
def test_groups_hold_every_factor_once_and_those_of_one_width_are_equally_many(
    monkeypatch, num_layers
):
    monkeypatch.setattr(factor_groups, "_ELEMENTS_PER_CALL", 8 * RANK * 7)
    layers = {str(index): LowRankLinear(5, 7, RANK, 0.5, lora_init) for index in range(num_layers)}
    layers["other"] = LowRankLinear(11, 5, RANK, 0.5, lora_init)  # its B is as wide as their A
    factors = FactorGroups(layers)
    held = [factor for group in factors.groups for factor in group.factors]
    assert sorted(held) == list(range(2 * (num_layers + 1)))
    sizes: dict[int, set[int]] = {}
    for group, moments in zip(factors.groups, factors.new_moments(), strict=True):
        assert moments.shape == group.shape
        assert len(moments) == len(group.factors) * RANK
        assert moments.numel() <= 8 * RANK * 7
        sizes.setdefault(moments.shape[1], set()).add(len(group.factors))
    assert all(len(of_width) == 1 for of_width in sizes.values())

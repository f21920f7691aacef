"""A reset leaves what a layer computes as it is, and exactly as much of its moments as asked."""

import pytest
import torch

from switchtitan.distributed.seeds import generator_for
from switchtitan.methods.lowrank import LowRankLinear, lora_init
from switchtitan.methods.relora import (
    largest,
    merge_and_restart_,
    num_pruned,
    prune_at_random_,
    prune_by_magnitude_,
)

OUT, IN, RANK = 7, 5, 3


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = LowRankLinear(IN, OUT, RANK, 0.5, lora_init)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def test_a_reset_keeps_what_the_layer_computes(layer):
    x = torch.randn(11, IN)
    before = layer(x).detach()
    merge_and_restart_(layer, generator_for(1, "a"))
    # Sums of five products of order 1, each rounded at 6e-8.
    torch.testing.assert_close(layer(x).detach(), before, rtol=1e-5, atol=2e-6)
    assert not layer.lora_b.any()
    assert (layer.weight.detach() @ x.T).T.allclose(layer(x).detach())


def test_new_factors_follow_from_the_generator_and_keep_to_the_bound(layer):
    old = layer.lora_a.detach().clone()
    merge_and_restart_(layer, generator_for(1, "a"))
    first = layer.lora_a.detach().clone()
    assert first.abs().max() <= IN**-0.5
    assert first.unique().numel() == first.numel()
    assert not torch.equal(first, old)
    merge_and_restart_(layer, generator_for(1, "a"))
    assert torch.equal(layer.lora_a, first)
    merge_and_restart_(layer, generator_for(1, "b"))
    assert not torch.equal(layer.lora_a, first)


@pytest.mark.parametrize("prune_ratio", [0.01, 0.5, 0.9, 0.99])
def test_magnitude_pruning_keeps_exactly_the_largest(prune_ratio):
    exp_avg = torch.randn(13, 17, generator=generator_for(2, "first"))
    exp_avg_sq = exp_avg.abs() * 3  # of one order, so that the same places are kept
    before = exp_avg.clone()
    prune_by_magnitude_(exp_avg, exp_avg_sq, prune_ratio)
    kept = exp_avg != 0
    assert kept.sum() == 13 * 17 - round(prune_ratio * 13 * 17)
    assert torch.equal(exp_avg[kept], before[kept])
    assert before[kept].abs().min() > before[~kept].abs().max()
    assert torch.equal(exp_avg_sq, exp_avg.abs() * 3)


def test_magnitude_pruning_leaves_no_first_moment_without_its_second():
    exp_avg = torch.randn(13, 17, generator=generator_for(2, "first"))
    exp_avg_sq = torch.rand(13, 17, generator=generator_for(2, "second")) + 1e-3
    prune_by_magnitude_(exp_avg, exp_avg_sq, 0.6)
    assert exp_avg_sq.count_nonzero() == 13 * 17 - num_pruned(13 * 17, 0.6)
    assert exp_avg.any()
    assert exp_avg_sq[exp_avg != 0].all()


def test_of_equal_values_the_first_are_kept():
    kept = largest(torch.tensor([[1.0, 2.0, 1.0], [1.0, 3.0, 1.0]]), 0.5)
    assert kept.tolist() == [[True, True, False], [False, True, False]]
    assert largest(torch.zeros(2, 5), 0.7).sum() == 3


@pytest.mark.parametrize("num_levels", [1, 3, 40, 10**6])
@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.9, 0.999])
def test_the_largest_are_those_of_a_stable_sort(num_levels, ratio):
    scores = (torch.rand(31, 29, generator=generator_for(5, "scores")) * num_levels).floor()
    order = scores.flatten().argsort(descending=True, stable=True)
    expected = torch.zeros(scores.numel(), dtype=torch.bool)
    expected[order[: scores.numel() - num_pruned(scores.numel(), ratio)]] = True
    assert torch.equal(largest(scores, ratio), expected.view(scores.shape))


def test_nothing_is_kept_where_all_values_are_pruned():
    assert not largest(torch.ones(1, 1), 0.9).any()


def test_random_pruning_keeps_the_same_places_in_both_moments():
    moments = [
        torch.rand(13, 17, generator=generator_for(3, name)) + 1 for name in ("first", "second")
    ]
    before = [moment.clone() for moment in moments]
    prune_at_random_(*moments, 0.9, generator_for(4, "lot"))
    kept = moments[0] != 0
    assert kept.sum() == 13 * 17 - num_pruned(13 * 17, 0.9)
    for moment, old in zip(moments, before, strict=True):
        assert torch.equal(moment, torch.where(kept, old, 0))
    again = [moment.clone() for moment in before]
    prune_at_random_(*again, 0.9, generator_for(4, "another"))
    assert not torch.equal(again[0], moments[0])

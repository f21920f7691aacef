"""Tokens are drawn with the probabilities of the softmax, restricted as asked."""

import pytest
import torch

from switchtitan.generation.sampling import Sampler, Sampling, probabilities

LOGITS = torch.tensor([[1.0, 3.0, -2.0, 2.0, 0.5, 2.5, -1.0]])


def chi_square(sampling: Sampling, expected: torch.Tensor, num_draws: int = 20_000) -> float:
    """Pearson's statistic of draws against the probabilities `expected`."""
    drawn = torch.tensor(Sampler(sampling, seed=3)(LOGITS.expand(num_draws, -1)))
    counts = torch.bincount(drawn, minlength=LOGITS.shape[1]).double()
    mean = expected.double() * num_draws
    is_possible = mean > 0
    assert counts[~is_possible].sum() == 0
    return ((counts - mean)[is_possible] ** 2 / mean[is_possible]).sum().item()


# 99.9 % of draws are below this with 6 degrees of freedom, and more with fewer.
CRITICAL = 22.46


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    expected = (LOGITS[0] / temperature).softmax(0)
    assert chi_square(Sampling(temperature), expected) < CRITICAL


def test_frequencies_do_not_follow_the_softmax_of_another_temperature():
    """Shows that the check above can fail."""
    assert chi_square(Sampling(1.0), (LOGITS[0] / 1.1).softmax(0)) > CRITICAL


def test_top_k_keeps_the_most_probable_tokens():
    kept = torch.tensor([1, 5, 3])
    expected = torch.zeros(7)
    expected[kept] = LOGITS[0, kept].softmax(0)
    torch.testing.assert_close(probabilities(LOGITS, Sampling(top_k=3))[0], expected)
    assert chi_square(Sampling(top_k=3), expected) < CRITICAL


def test_top_p_keeps_the_fewest_tokens_that_suffice():
    ordered, order = LOGITS[0].softmax(0).sort(descending=True)
    sums = ordered.cumsum(0)
    for num_kept in range(1, 7):
        # Just below the sum of `num_kept` tokens, all of these are needed.
        found = probabilities(LOGITS, Sampling(top_p=sums[num_kept - 1].item() - 1e-4))[0]
        expected = torch.zeros(7)
        expected[order[:num_kept]] = ordered[:num_kept] / sums[num_kept - 1]
        torch.testing.assert_close(found, expected)


def test_without_restriction_all_tokens_stay():
    torch.testing.assert_close(
        probabilities(LOGITS, Sampling(top_k=7, top_p=1.0)), LOGITS.softmax(-1)
    )


def test_a_seed_repeats_its_tokens_and_another_does_not():
    many = LOGITS.expand(50, -1)
    first, again, other = (Sampler(Sampling(), seed)(many) for seed in (5, 5, 6))
    assert first == again != other


def test_temperature_0_takes_the_most_probable_token():
    assert Sampler(Sampling(temperature=0))(LOGITS) == [1]


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    Sampler(Sampling())(LOGITS)
    assert torch.equal(torch.get_rng_state(), before)

"""Drawn vectors: uniform, unrelated to their neighbours, and drawable in any part."""

import itertools

import numpy as np
import pytest
import torch
from support.switchlora_reference import constant_candidates

from switchtitan.distributed.seeds import generator_for, splitmix64
from switchtitan.methods.switchlora.init import draw_vectors, draw_vectors_of_widths

NUM_SLOTS, WIDTH = 200, 500


def draw(name, num_slots=NUM_SLOTS, elements=range(WIDTH), bound=1.0, seed=0):
    """The candidates `name`, [slots, elements]."""
    key = torch.tensor(generator_for(seed, name).initial_seed())
    keys = splitmix64(key, torch.arange(num_slots))
    return draw_vectors(keys, torch.full((num_slots,), bound), elements)


def test_vectors_are_those_of_the_definition():
    expected = constant_candidates(5, "layer.candidates_a", 7, 11, bound=0.3)
    assert torch.equal(draw("layer.candidates_a", 7, range(11), bound=0.3, seed=5), expected)


def test_any_part_of_a_vector_is_drawn_by_itself():
    full = draw("a", 9, range(31))
    for start, stop in ((0, 8), (8, 31), (30, 31), (5, 5)):
        assert torch.equal(draw("a", 9, range(start, stop)), full[:, start:stop])


def test_vectors_of_several_widths_are_those_of_each_width():
    keys = splitmix64(torch.tensor(17), torch.arange(4))
    bounds, widths = torch.tensor([0.5, 1.0, 0.0, 2.0]), np.array([7, 5, 5, 11])
    drawn = draw_vectors_of_widths(keys, bounds, widths, torch.device("cpu"))
    for index, vector in enumerate(drawn.split(widths.tolist())):
        alone = draw_vectors(keys[index, None], bounds[index, None], range(len(vector)))
        assert torch.equal(vector, alone[0])
        assert vector.abs().max() > 0 or bounds[index] == 0


def test_values_are_uniform_within_the_bound():
    values = draw("a", bound=0.37).flatten().double() / 0.37
    count = values.numel()
    assert -1 <= values.min() < -1 + 10 / count
    assert 1 - 10 / count < values.max() <= 1
    # Five standard errors: of the mean sqrt(1/3 / n), of the second moment sqrt(4/45 / n).
    assert abs(values.mean().item()) < 5 * (1 / 3 / count) ** 0.5
    assert values.square().mean().item() == pytest.approx(1 / 3, abs=5 * (4 / 45 / count) ** 0.5)
    counts = torch.histc(values, bins=64, min=-1, max=1)
    chi_square = ((counts - count / 64) ** 2 / (count / 64)).sum().item()
    assert (
        abs(chi_square - 63) < 5 * (2 * 63) ** 0.5
    )  # mean and standard deviation of chi^2 with 63 degrees


def test_every_bit_is_set_half_the_time():
    values = (draw("a").flatten().double() * 2**23).long() & (2**24 - 1)
    for bit in range(24):
        share = ((values >> bit) & 1).double().mean().item()
        assert abs(share - 0.5) < 5 * 0.5 / values.numel() ** 0.5, f"bit {bit}"


def correlation(first, second):
    return torch.corrcoef(torch.stack([first.flatten(), second.flatten()]).double())[0, 1].item()


def test_neighbours_are_unrelated():
    """Elements, slots, A and B, layers and seeds are uncorrelated.

    Each has up to 100 000 pairs, so five standard errors are 0.016.
    """
    values = draw("layers.0.candidates_a")
    others = [
        draw("layers.0.candidates_b"),
        draw("layers.1.candidates_a"),
        draw("layers.0.candidates_a", seed=1),
    ]
    pairs = [(values, other) for other in others]
    pairs += [(values[:, :-lag], values[:, lag:]) for lag in (1, 2, 8)]
    pairs += [(values[:-lag], values[lag:]) for lag in (1, 2, 8)]
    pairs += [(values[:-1, :-1], values[1:, 1:]), (values[:-1, 1:], values[1:, :-1])]
    for first, second in pairs:
        assert abs(correlation(first, second)) < 0.016
    assert correlation(values, values.clone()) == pytest.approx(1)


def test_vectors_point_in_all_directions():
    """Gram matrix of unit-variance vectors: off the diagonal, cosines of size 1/sqrt(width)."""
    values = draw("a", 60, range(400)).double() * 3**0.5
    gram = values @ values.T / 400
    cosines = gram[~torch.eye(60, dtype=torch.bool)]
    assert cosines.abs().max() < 5 / 400**0.5
    assert cosines.square().mean().item() == pytest.approx(
        1 / 400, rel=0.15
    )  # 1770 pairs: sqrt(2 / 1770) is 0.034


def test_no_two_vectors_are_alike():
    vectors = torch.cat([draw(name, 50, range(6)) for name in ("a", "b", "c", "d")])
    assert len(vectors.unique(dim=0)) == 200
    for first, second in itertools.pairwise(vectors):
        assert not torch.equal(first[1:], second[:-1]), "a vector shifted by one element"

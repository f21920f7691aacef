"""Similarity of activations, numbers of matrices, sharpness and barriers, on known functions."""

import math

import pytest
import torch

from switchtitan.geometry.activations import SimilarityOfActivations
from switchtitan.geometry.directions import random_direction
from switchtitan.geometry.landscape import barrier, between, expected_sharpness
from switchtitan.geometry.matrices import matrix_geometry

NUM_TOKENS, DIM = 300, 6


def drawn(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (NUM_TOKENS, DIM), generator=generator, dtype=torch.float64)


def similarity(first, second, num_parts=1):
    sums = SimilarityOfActivations()
    for x, y in zip(first.chunk(num_parts), second.chunk(num_parts), strict=True):
        sums.add(x, y)
    return sums.result()


def test_cka_is_one_of_rotated_scaled_and_shifted_features_only():
    x = drawn(0) + 2
    rotation = torch.linalg.qr(drawn(1, DIM, DIM))[0]
    found = similarity(3 * x @ rotation + 5, x)
    assert found.linear_cka == pytest.approx(1)
    assert found.cosine < 0.99
    assert found.relative_l2 > 1
    # Of independent features it is about dim / tokens.
    assert similarity(x, drawn(2) + 2).linear_cka < 0.1
    assert 0.2 < similarity(x, x * torch.tensor([10.0, 1, 1, 1, 1, 1])).linear_cka < 0.9


def test_cka_equals_the_form_with_matrices_of_tokens():
    x, y = drawn(0) + 2, drawn(0) @ drawn(3, DIM, DIM) + drawn(4)
    centring = torch.eye(NUM_TOKENS, dtype=torch.float64) - 1 / NUM_TOKENS
    k, m = centring @ x @ x.T @ centring, centring @ y @ y.T @ centring
    expected = (k * m).sum() / (k.norm() * m.norm())
    assert similarity(x, y, num_parts=7).linear_cka == pytest.approx(expected.item(), rel=1e-9)


def test_cosine_and_distance_of_known_vectors():
    y = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    x = torch.tensor([[3.0, 0.0], [2.0, 0.0]])  # parallel, orthogonal
    found = similarity(x, y)
    assert found.cosine == pytest.approx(0.5)
    assert found.relative_l2 == pytest.approx(((4 + 4 + 4) / 5) ** 0.5)


def test_numbers_of_a_matrix_with_known_singular_values():
    values = [4.0, 3.0, 1.0, 0.05, 0.03]  # the last is below 1 % of 4
    shares = [value / sum(values) for value in values]
    effective = math.exp(-sum(share * math.log(share) for share in shares))
    norm = math.sqrt(sum(value**2 for value in values))
    expected = (4, effective, effective / 5, norm**2 / 16, 0.25, norm, norm / 10)
    # Singular values are fp32.
    found = matrix_geometry(torch.tensor(values), reference_norm=10.0)
    assert found == pytest.approx(expected, rel=1e-6)


def test_sharpness_of_a_quadratic_is_its_curvature_along_the_direction():
    here = {"first": drawn(5, 5, 7), "norm": drawn(6, 4), "second": 3 * drawn(7, 3, 5)}

    def loss(point):
        # The gradient at `here` cancels.
        bends = {"first": 2.0, "second": 0.5}
        return sum(
            of * (point[name] - here[name] - 1).square().sum() / 2 for name, of in bends.items()
        )

    def sharpness(direction):
        return expected_sharpness(loss, here, direction, (0.1, 0.3), loss(here))

    # A random direction is as long as each matrix, up to fp32, and leaves vectors alone.
    bends = 2.0 * here["first"].square().sum() + 0.5 * here["second"].square().sum()
    expected = (0.1**2 + 0.3**2) / 2 * bends.item() / 2
    assert float(sharpness(random_direction(here, seed=1, number=0))) == pytest.approx(
        expected, rel=1e-6
    )
    assert float(sharpness({"norm": torch.ones_like(here["norm"])})) == pytest.approx(0, abs=1e-9)


def test_a_barrier_is_how_far_the_loss_rises_above_the_chord():
    first, second = ({"x": torch.tensor([value, 0.0])} for value in (-1.0, 1.0))

    def double_well(point):
        return (point["x"][0].item() ** 2 - 1) ** 2 + 0.5

    found = barrier(double_well, first, second, num_points=3)
    assert (found.height, found.position) == (pytest.approx(1), 0.5)
    assert found.losses == pytest.approx([0.5, 0.5 + 0.75**2, 1.5, 0.5 + 0.75**2, 0.5])
    slope = barrier(lambda point: 3 * point["x"][0].item(), first, second, 5)
    assert slope.height == pytest.approx(0, abs=1e-6)  # fp32 interpolation
    bowl = barrier(lambda point: point["x"][0].item() ** 2, first, second, 3)
    assert bowl.height == pytest.approx(-4 * 0.25 * 0.75)
    for position, end in ((0.0, first), (1.0, second)):
        assert torch.equal(between(first, second, position)["x"], end["x"])

"""Sharpness and barriers of losses whose values are known."""

import math

import pytest
import torch

from switchtitan.geometry.directions import (
    perturbed_names,
    principal_directions,
    random_direction,
    scaled_to_weights,
)
from switchtitan.geometry.landscape import barrier, between, expected_sharpness, moved, norm_of

OFFSETS = (0.1, 0.3)
MEAN_SQUARE = (0.1**2 + 0.3**2) / 2


def weights():
    generator = torch.Generator().manual_seed(5)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {"first": drawn(5, 7), "norm": drawn(4), "second": 3 * drawn(3, 5)}


def quadratic(curvatures, centre):
    """sum_i c_i |w_i - centre_i|^2 / 2 over tensors."""
    return lambda point: sum(
        curvature * (point[name] - centre[name]).square().sum().item() / 2
        for name, curvature in curvatures.items()
    )


def test_sharpness_of_a_quadratic_is_its_curvature_along_the_direction():
    here = weights()
    centre = {name: weight + 1 for name, weight in here.items()}  # a gradient, which cancels
    loss = quadratic({"first": 2.0, "second": 0.5}, centre)
    direction = random_direction(here, seed=1, number=0)
    found = expected_sharpness(loss, here, direction, OFFSETS, loss(here))
    # d_i is as long as w_i, up to fp32.
    bends = 2.0 * here["first"].square().sum() + 0.5 * here["second"].square().sum()
    assert found == pytest.approx(MEAN_SQUARE * bends.item() / 2, rel=1e-6)
    # A control: along the flat tensor, and for a linear loss, there is none.
    flat = {"norm": torch.ones_like(here["norm"])}
    assert expected_sharpness(loss, here, flat, OFFSETS, loss(here)) == pytest.approx(0, abs=1e-9)
    linear = expected_sharpness(
        lambda point: point["first"].sum().item(), here, direction, OFFSETS, here["first"].sum()
    )
    assert linear == pytest.approx(0, abs=1e-9)


def test_sharpness_is_negative_at_a_maximum():
    here = weights()
    loss = quadratic({"first": -1.0}, here)
    direction = random_direction(here, 1, 0)
    assert expected_sharpness(loss, here, direction, OFFSETS, 0.0) < 0


def test_random_directions_have_the_norm_of_each_matrix_and_depend_on_seed_and_number():
    here = weights()
    direction = random_direction(here, 1, 0)
    assert list(direction) == perturbed_names(here) == ["first", "second"]
    for name, part in direction.items():
        assert part.norm().item() == pytest.approx(here[name].norm().item(), rel=1e-6)
    again, other_seed, other = (random_direction(here, *key) for key in ((1, 0), (2, 0), (1, 1)))
    assert all(torch.equal(direction[name], again[name]) for name in direction)
    for different in (other_seed, other):
        cosine = torch.cosine_similarity(
            direction["first"].flatten(), different["first"].flatten(), dim=0
        )
        assert abs(cosine) < 0.6  # about 1 / sqrt(35)
    doubled = random_direction({name: 2 * weight for name, weight in here.items()}, 1, 0)
    torch.testing.assert_close(doubled["second"], 2 * direction["second"])


def test_principal_directions_of_points_in_a_plane_are_those_of_the_plane():
    here = weights()
    axes = [random_direction(here, 7, number) for number in range(2)]
    # The second axis is made orthogonal to the first, and both get norm 1.
    along = sum((axes[0][name] * axes[1][name]).sum() for name in axes[0])
    axes[1] = moved(axes[1], axes[0], -along.item() / norm_of(axes[0]) ** 2)
    axes = [{name: part / norm_of(axis) for name, part in axis.items()} for axis in axes]
    coordinates = [(-12.0, 1.0), (-4.0, -2.0), (4.0, 3.0), (7.0, -1.0)]
    points = [moved(moved(here, axes[0], x), axes[1], y) for x, y in coordinates]
    found = principal_directions(
        lambda name: [point[name] for point in points], perturbed_names(here), count=5
    )
    assert len(found) == 2  # four points, but in a plane
    matrix = torch.tensor(coordinates, dtype=torch.float64)
    _, singular, right = torch.linalg.svd(matrix - matrix.mean(0))
    for number, principal in enumerate(found):
        expected = moved(
            {name: right[number, 0] * part for name, part in axes[0].items()},
            axes[1],
            right[number, 1].item(),
        )
        cosine = sum((expected[name] * principal.direction[name]).sum() for name in expected)
        assert abs(cosine.item()) == pytest.approx(1, abs=1e-6)
        assert norm_of(principal.direction) == pytest.approx(1, abs=1e-9)
        share = (singular[number] ** 2 / singular.square().sum()).item()
        assert principal.share == pytest.approx(share, rel=1e-6)


def test_equal_points_have_no_principal_direction():
    here = weights()
    found = principal_directions(lambda name: [here[name]] * 3, ["first", "second"], 2)
    assert found == []


def test_a_principal_direction_moves_as_far_as_a_random_one():
    here = weights()
    direction = scaled_to_weights({"first": torch.ones(5, 7), "second": torch.ones(3, 5)}, here)
    assert norm_of(direction) == pytest.approx(norm_of(random_direction(here, 0, 0)), rel=1e-6)
    assert direction["first"].max() == pytest.approx(direction["second"].min().item())


def test_the_barrier_of_a_double_well_is_its_top():
    first = {"x": torch.tensor([-1.0, 0.0])}
    second = {"x": torch.tensor([1.0, 0.0])}

    def loss(point):
        return (point["x"][0].item() ** 2 - 1) ** 2 + 0.5

    found = barrier(loss, first, second, num_points=3)
    assert found.height == pytest.approx(1)
    assert found.position == 0.5
    assert found.positions == [0, 0.25, 0.5, 0.75, 1]
    assert found.losses == pytest.approx([0.5, 0.5 + 0.75**2, 1.5, 0.5 + 0.75**2, 0.5])


def test_a_barrier_is_measured_from_the_chord_and_a_convex_loss_has_none():
    first, second = {"x": torch.tensor(0.0)}, {"x": torch.tensor(2.0)}
    slope = barrier(lambda point: 3 * point["x"].item(), first, second, 5)
    assert slope.height == pytest.approx(0, abs=1e-6)  # fp32 interpolation
    # The other form would count the slope: L(a) - (L(0) + L(1)) / 2 is 2 at a = 5/6.
    assert max(slope.losses[1:-1]) - (slope.losses[0] + slope.losses[-1]) / 2 == pytest.approx(2)
    bowl = barrier(lambda point: point["x"].item() ** 2, first, second, 3)
    assert bowl.height == pytest.approx(-4 * 0.25 * 0.75)
    bump = barrier(lambda point: math.sin(point["x"].item()), first, second, 199)
    best = math.acos(math.sin(2) / 2)
    assert bump.height == pytest.approx(math.sin(best) - math.sin(2) * best / 2, rel=1e-4)


def test_both_ends_of_a_line_are_exact():
    first, second = weights(), {name: -3 * weight for name, weight in weights().items()}
    assert all(torch.equal(between(first, second, 0.0)[name], first[name]) for name in first)
    assert all(torch.equal(between(first, second, 1.0)[name], second[name]) for name in first)

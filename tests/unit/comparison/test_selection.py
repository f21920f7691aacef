import math

import pytest

from switchtitan.comparison.selection import best_value, is_interior, is_rate, widened


@pytest.mark.parametrize(
    ("losses", "rate", "interior"),
    [
        ({1e-3: 3.0, 2e-3: 2.0, 4e-3: 2.5}, 2e-3, True),
        ({1e-3: 3.0, 2e-3: 2.0, 4e-3: math.inf}, 2e-3, True),
        ({4e-3: 2.5, 1e-3: 1.0, 2e-3: 2.0}, 1e-3, False),
        ({1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.5}, 4e-3, False),
        ({1e-3: 2.0, 2e-3: 2.0, 4e-3: 2.5}, 1e-3, False),
    ],
)
def test_the_best_rate_and_whether_it_is_between_two_others(losses, rate, interior):
    assert best_value(losses) == rate
    assert is_interior(losses) is interior


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        # The best rate is at an edge: the grid is extended there, with the same ratio.
        ({1e-3: 1.0, 2e-3: 2.0, 6e-3: 2.5}, [5e-4, 1e-3, 2e-3, 6e-3]),
        ({1e-3: 3.0, 2e-3: 2.0, 6e-3: 1.5}, [1e-3, 2e-3, 6e-3, 1.8e-2]),
        # The best rate is in the middle: the end with the lower loss is extended.
        ({1e-3: 3.0, 2e-3: 2.0, 4e-3: 2.5}, [1e-3, 2e-3, 4e-3, 8e-3]),
        ({1e-3: 2.4, 2e-3: 2.0, 4e-3: 2.5}, [5e-4, 1e-3, 2e-3, 4e-3]),
        ({1e-3: 2.4, 2e-3: 2.0, 4e-3: math.inf}, [5e-4, 1e-3, 2e-3, 4e-3]),
        # Four rates: the nearest end is extended.
        ({1e-3: 2.0, 2e-3: 2.1, 4e-3: 1.9, 8e-3: 3.0}, [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]),
    ],
)
def test_a_wider_grid_has_one_more_rate_for_every_row(losses, expected):
    assert widened(list(losses), losses) == pytest.approx(expected, rel=1e-12)


def test_learning_rates_are_told_from_other_keys():
    assert is_rate("optimizer.lr")
    assert is_rate("optimizer.other_lr")
    assert not is_rate("optimizer.weight_decay")
    assert not is_rate("method.interval")

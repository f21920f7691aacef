import pytest

from switchtitan.checkpoint import check_same_run
from switchtitan.errors import CheckpointError


def test_equal_identities_pass_whatever_the_kind_of_sequence():
    check_same_run(
        {"model": {"size": "9m", "betas": [0.9, 0.99]}},
        {"model": {"betas": (0.9, 0.99), "size": "9m"}},
    )


def test_every_difference_is_named_with_both_values():
    saved = {
        "model": {"size": "9m", "heads": 4},
        "method": {"name": "switchlora", "rank": 3},
        "corpus": "abc",
    }
    current = {
        "model": {"size": "20m", "heads": 4},
        "method": {"name": "full_rank"},
        "corpus": "abd",
    }
    with pytest.raises(CheckpointError) as raised:
        check_same_run(saved, current)
    message = str(raised.value)
    assert "model.size: saved with '9m', now '20m'" in message
    assert "method.rank: saved with 3, now '(absent)'" in message
    assert "corpus: saved with 'abc', now 'abd'" in message
    assert "heads" not in message
    assert "output_dir" in message

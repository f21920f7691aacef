"""Settings that would have no effect, or would never let a run train, are refused."""

import pytest
from pydantic import ValidationError

from switchtitan.methods.relora import ReloraConfig


def test_a_warmup_as_long_as_the_interval_is_refused():
    ReloraConfig(rank=4, reset_interval=8, restart_warmup_steps=7)
    with pytest.raises(
        ValidationError, match="restart_warmup_steps = 8 is not below reset_interval = 8"
    ):
        ReloraConfig(rank=4, reset_interval=8, restart_warmup_steps=8)


def test_a_prune_ratio_that_would_have_no_effect_is_refused():
    ReloraConfig(rank=4, reset_interval=200, reset_moments="zero")
    with pytest.raises(ValidationError, match="prune_ratio has no effect"):
        ReloraConfig(rank=4, reset_interval=200, reset_moments="zero", prune_ratio=0.9)


@pytest.mark.parametrize("prune_ratio", [0.0, 1.0])
def test_pruning_nothing_or_everything_is_refused(prune_ratio):
    with pytest.raises(ValidationError, match="prune_ratio"):
        ReloraConfig(rank=4, reset_interval=200, prune_ratio=prune_ratio)


def test_an_interval_that_no_reset_would_come_within_is_refused():
    config = ReloraConfig(rank=4, reset_interval=200)
    assert config.check_length(201) == []
    (problem,) = config.check_length(200)
    assert problem.startswith(
        "[method] reset_interval = 200: expected less than [training] steps = 200"
    )
    assert 'name = "lora"' in problem

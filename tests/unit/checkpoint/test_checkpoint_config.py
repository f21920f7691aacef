import pytest
from pydantic import ValidationError

from switchtitan.checkpoint import CheckpointConfig


def test_initial_weights_without_effect_are_an_error():
    CheckpointConfig(initial_weights="dense", resume="auto")
    with pytest.raises(ValidationError, match="has no effect"):
        CheckpointConfig(initial_weights="dense", resume="runs/a")


@pytest.mark.parametrize("key", ["interval", "keep_latest"])
def test_negative_counts_are_refused(key):
    with pytest.raises(ValidationError):
        CheckpointConfig(**{key: -1})

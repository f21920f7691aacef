"""A run's weights that cannot be measured."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from switchtitan.errors import CheckpointError
from switchtitan.geometry.runs import Run


def test_weights_that_are_not_finite_are_refused_with_step_and_name():
    weights = {"q.weight": torch.ones(3, 2), "k.weight": torch.tensor([[1.0, float("nan")]])}
    stored = SimpleNamespace(read=lambda names: {name: weights[name] for name in names})
    run = Run("label", Path("outputs/RUN"), None, {7: stored})
    assert torch.equal(run.read(7, ["q.weight"])["q.weight"], weights["q.weight"])
    with pytest.raises(CheckpointError, match=r"outputs/RUN, step 7: k\.weight has values that"):
        run.read(7, ["q.weight", "k.weight"])

"""A run with every optimizer learns, and resumes bitwise."""

import pytest
import torch
from support.packages import needs_torchao
from support.tiny import full_tensors, tiny_trainer, train_steps

from switchtitan.distributed.world import stop_world

RATES = {"adafactor": 0.1, "adamw8bit": 0.01, "muon": 0.02, "scale": 0.01, "sgd": 0.3}


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        *(
            pytest.param("full_rank", name, marks=needs_torchao if "8bit" in name else ())
            for name in RATES
        ),
        ("switchlora", "muon"),
    ],
)
def test_the_loss_of_a_run_falls_and_it_resumes_bitwise(corpora, optimizer, method):
    rate = RATES[optimizer]
    keys = ("--optimizer.name", optimizer, "--optimizer.lr", str(rate))
    keys += ("--optimizer.other_lr", str(rate / 2))
    folder = corpora / f"optimizer-{optimizer}-{method}"
    straight = tiny_trainer(folder, method, *keys)
    losses = train_steps(straight, 6)
    straight.save()
    losses += train_steps(straight, 6)
    expected = full_tensors(straight)
    straight.close()
    stop_world()
    assert losses[-1] < losses[0] - 0.1
    resumed = tiny_trainer(folder, method, *keys)
    assert train_steps(resumed, 6) == losses[6:]
    resumed.close()
    tensors = full_tensors(resumed)
    assert any(name.startswith("optimizer.") for name in tensors)
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name

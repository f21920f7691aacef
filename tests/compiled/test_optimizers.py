"""Compiled updates of AdamW and of Muon equal the uncompiled ones."""

import pytest
import torch
from support.optimizer_steps import build, parameters, train

from switchtitan.optim import AdamWConfig
from switchtitan.optim.muon import MuonConfig

SHAPES = {
    "embed.weight": (11, 5),
    "layers.0.up.weight": (9, 5),
    "layers.0.down.weight": (5, 9),
    "layers.0.norm.weight": (5,),
}
KEYS = {"lr": 0.03, "weight_decay": 0.2}
NUM_STEPS = 12

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def trained(config, compile_step, compute_dtype=torch.float32):
    """Parameters after some steps, and the state; nothing compiles after the first step."""
    named = parameters(SHAPES)
    optimizer = build(config, named, compile_step=compile_step, compute_dtype=compute_dtype)
    train(optimizer, named, range(1))
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(optimizer, named, range(1, NUM_STEPS))
    return named, optimizer.state_dict()


def test_adamw_is_torchs_fused_update_to_rounding():
    adamw = AdamWConfig(**KEYS)
    (compiled, _), (eager, _) = (trained(adamw, compile_step) for compile_step in (True, False))
    start = parameters(SHAPES)
    for name, expected in eager.items():
        # 12 updates of order 0.01 to 1, each rounded in another order in fp32.
        torch.testing.assert_close(compiled[name], expected, rtol=1e-5, atol=1e-6)
        assert (expected - start[name]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("compute_dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_muon_is_the_same_to_rounding(compute_dtype, tolerance):
    muon = MuonConfig(**KEYS)
    (compiled, _), (eager, _) = (trained(muon, compiles, compute_dtype) for compiles in (1, 0))
    for name, expected in eager.items():
        torch.testing.assert_close(compiled[name], expected, rtol=tolerance, atol=tolerance)

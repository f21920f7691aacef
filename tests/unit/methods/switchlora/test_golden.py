"""The trajectory recorded from the original implementation: see tests/data/golden/README.md."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from switchtitan.methods.lowrank import LayerBuffer, LowRankLinear, lora_init
from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.optimizer import SwitchLoraOptimizer
from switchtitan.methods.switchlora.vector_adamw import VectorAdamW
from switchtitan.optim import AdamW, AdamWConfig

GOLDEN = Path(__file__).parents[3] / "data" / "golden" / "linear_multi.npz"
RANK, FREEZE_STEPS, NUM_STEPS = 20, 5, 40
TOLERANCE = 2e-6  # fp32, forty steps of Adam; an independent port reached 2.4e-7


@pytest.fixture
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def build(golden, compile_step):
    hyper = json.loads(str(golden["hyper_json"]))
    layer = LowRankLinear(
        28,
        23,
        RANK,
        hyper["scaling"],
        lora_init,
        buffers={"candidates_a": LayerBuffer((23, 28)), "candidates_b": LayerBuffer((23, 23))},
    )
    with torch.no_grad():
        for target, name in (
            (layer.weight, "W"),
            (layer.lora_a, "A"),
            (layer.candidates_a, "poolA"),
            (layer.candidates_b, "poolB"),
        ):
            target.copy_(torch.from_numpy(golden[f"mlp.init.{name}"]))
        layer.lora_b.copy_(torch.from_numpy(golden["mlp.init.B"]).T)
    config = SwitchLoraConfig(rank=RANK, interval=10, decay="constant", freeze_steps=FREEZE_STEPS)
    adamw = AdamWConfig(lr=hyper["lr"])
    layers, dense = {"mlp": layer}, AdamW(adamw, [])
    rule = VectorAdamW(adamw, layers, compile_step)
    optimizer = SwitchLoraOptimizer(config, layers, rule, dense, NUM_STEPS, 0, compile_step)
    return layer, optimizer


@pytest.mark.parametrize("compile_step", [False, True])
def test_golden_trajectory_is_reproduced(golden, compile_step):
    layer, optimizer = build(golden, compile_step)
    slots_a = np.asarray(golden["mlp.init.selA"]).copy()
    slots_b = np.asarray(golden["mlp.init.selB"]).copy()
    timers = torch.zeros(2, RANK)
    shares_of_frozen = []
    for t in range(NUM_STEPS):
        x, y = torch.from_numpy(golden["x"][t]), torch.from_numpy(golden["y"][t])
        loss = (layer(x) - y).square().mean()
        assert loss.item() == pytest.approx(float(golden["loss"][t]), rel=TOLERANCE)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([layer.lora_a, layer.lora_b], 1.0)
        # Of all vectors, frozen ones included.
        assert norm.item() == pytest.approx(float(golden["grad_norm"][t]), rel=1e-5)
        factors = layer.lora_a, layer.lora_b
        squares = torch.stack([factor.grad.square().sum(1) for factor in factors])
        shares_of_frozen.append((squares[timers > 0].sum() / squares.sum()).item())
        optimizer.step()
        optimizer.zero_grad()

        state = optimizer.state_dict()
        switched = int(state["switch.num_switched"])
        assert switched == 2 * (t + 1)
        assert switched % RANK == golden["mlp.ptrA"][t]
        assert (RANK // 2 + switched) % RANK == golden["mlp.ptrB"][t]
        for p in range(switched - 2, switched):
            slots_a[p % RANK] = slots_b[(RANK // 2 + p) % RANK] = p % 23
        np.testing.assert_array_equal(slots_a, golden["mlp.selA"][t])
        np.testing.assert_array_equal(slots_b, golden["mlp.selB"][t])
        timers, steps = state["switch.freeze_steps_left"][:, 0], state["switch.vector_steps"][:, 0]
        np.testing.assert_array_equal(timers[0], golden["mlp.fixA"][t])
        np.testing.assert_array_equal(timers[1], golden["mlp.fixB"][t])
        np.testing.assert_array_equal(steps[0], golden["mlp.stepA"][t])
        np.testing.assert_array_equal(steps[1], golden["mlp.stepB"][t])
        for tensor, name in (
            (layer.weight, "W"),
            (layer.lora_a, "A"),
            (layer.lora_b.T, "B"),
            (state["mlp.lora_a.exp_avg"], "mA"),
            (state["mlp.lora_a.exp_avg_sq"], "vA"),
            (state["mlp.lora_b.exp_avg"].T, "mB"),
            (state["mlp.lora_b.exp_avg_sq"].T, "vB"),
        ):
            np.testing.assert_allclose(
                tensor.detach().numpy(),
                golden[f"mlp.{name}"][t],
                rtol=0,
                atol=TOLERANCE,
                err_msg=f"{name} after step {t}",
            )

    # Without them, the norm would miss the recorded one.
    assert max(shares_of_frozen) > 0.01

    resting_a = np.setdiff1d(np.arange(23), slots_a)
    resting_b = np.setdiff1d(np.arange(23), slots_b)
    np.testing.assert_allclose(
        layer.candidates_a.numpy()[resting_a],
        golden["mlp.final.poolA"][resting_a],
        rtol=0,
        atol=TOLERANCE,
    )
    np.testing.assert_allclose(
        layer.candidates_b.numpy()[resting_b],
        golden["mlp.final.poolB"][resting_b],
        rtol=0,
        atol=TOLERANCE,
    )

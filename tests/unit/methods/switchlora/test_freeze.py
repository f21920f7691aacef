"""What stands still after a switch, for how long, and what optimizer state a switched vector keeps."""

import pytest
import torch
from support.switchlora_layers import build_layer, build_optimizer, set_gradients

from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.freeze import FreezeTimers
from switchtitan.methods.switchlora.vectors import FACTOR_A, FACTOR_B, VectorSpan
from switchtitan.optim import AdamWConfig

RANK, LR = 6, 1e-2


def vectors(layer):
    """Copies of all vectors by (factor, index)."""
    return {
        (factor, i): row.clone()
        for factor, rows in ((FACTOR_A, layer.lora_a), (FACTOR_B, layer.lora_b))
        for i, row in enumerate(rows.detach())
    }


def record_run(freeze_steps, weight_decay=0.0, gradient=0.7, num_steps=40):
    """Runs one layer, at most one vector a factor and step; (vectors before, after, p before, p after) of each step."""
    layer = build_layer(9, 14, RANK, 0.5, torch.float64)
    # A vector is next switched or reset after RANK // 2 switches, 13 steps or more, when it has long moved again.
    config = SwitchLoraConfig(rank=RANK, interval=27, freeze_steps=freeze_steps, decay="constant")
    optimizer = build_optimizer(
        config, AdamWConfig(lr=LR, weight_decay=weight_decay), [layer], num_steps
    )
    record = []
    for _ in range(num_steps):
        before, switched = vectors(layer), int(optimizer.state_dict()["switch.num_switched"])
        set_gradients([layer], gradient)
        optimizer.step()
        record.append(
            (before, vectors(layer), switched, int(optimizer.state_dict()["switch.num_switched"]))
        )
    return record


def counterparts(switched_before, switched_after):
    """Vectors of B at the place of the switched vector of A, and the other way round."""
    assert switched_after - switched_before <= 1
    if switched_after == switched_before:
        return []
    return [(FACTOR_B, switched_before % RANK), (FACTOR_A, (RANK // 2 + switched_before) % RANK)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.4])
@pytest.mark.parametrize("freeze_steps", [0, 1, 2, 5])
def test_exactly_the_counterparts_of_the_last_steps_stand_still(freeze_steps, weight_decay):
    record = record_run(freeze_steps, weight_decay)
    reset_at = {}
    num_still = 0
    for step, (before, after, *switched) in enumerate(record):
        reset_at |= dict.fromkeys(counterparts(*switched), step)
        still = {vector for vector in before if torch.equal(before[vector], after[vector])}
        assert still == {
            vector for vector, start in reset_at.items() if step < start + freeze_steps
        }
        num_still += len(still)
    assert len(reset_at) >= 8, "too few switches to test anything"
    assert (num_still > 0) == (freeze_steps > 0)


def test_first_update_after_the_rest_is_about_half_the_learning_rate():
    """(1 - b1) / (1 - b1^6) / sqrt((1 - b2) / (1 - b2^6)) = 0.522 with betas 0.9 and 0.999, after 5 steps of zero gradient."""
    expected = LR * 0.1 / (1 - 0.9**6) / (0.001 / (1 - 0.999**6)) ** 0.5
    assert expected == pytest.approx(0.52 * LR, rel=5e-3)
    record = record_run(freeze_steps=5)
    num_first_updates = 0
    for step, (_, _, *switched) in enumerate(record[:-5]):
        for vector in counterparts(*switched):
            before, after = record[step + 5][:2]
            # eps 1e-8 beside a gradient of 0.7
            torch.testing.assert_close(
                after[vector], before[vector] - expected, rtol=0, atol=1e-7 * LR
            )
            num_first_updates += 1
    assert num_first_updates >= 8


def moments_of(state, factor, vector):
    """[moments, elements] and the step count."""
    name = "lora_a" if factor == FACTOR_A else "lora_b"
    moments = [state[f"layer0.{name}.{key}"] for key in ("exp_avg", "exp_avg_sq")]
    return (
        torch.stack([m[vector] for m in moments]),
        state["switch.vector_steps"][factor, 0, vector].item(),
    )


def test_vector_switched_in_keeps_the_moments_and_the_steps_of_the_one_it_replaces():
    """Counterparts start anew; all others go on as AdamW does, switched or not."""
    layer = build_layer(9, 14, RANK, 0.5, torch.float64)
    config = SwitchLoraConfig(rank=RANK, interval=6, freeze_steps=2, decay="constant")
    optimizer = build_optimizer(config, AdamWConfig(lr=LR), [layer], 20)
    for _ in range(20):
        old = {key: tensor.clone() for key, tensor in optimizer.state_dict().items()}
        held = vectors(layer)
        for factor in (layer.lora_a, layer.lora_b):
            factor.grad = torch.randn_like(factor)
        optimizer.step()
        state = optimizer.state_dict()
        p = int(old["switch.num_switched"])
        assert int(state["switch.num_switched"]) == p + 1
        of_a, of_b = p % RANK, (RANK // 2 + p) % RANK
        for (factor, vector), value in vectors(layer).items():
            moments, steps = moments_of(state, factor, vector)
            old_moments, old_steps = moments_of(old, factor, vector)
            if (factor, vector) in ((FACTOR_B, of_a), (FACTOR_A, of_b)):
                assert steps == 1
                assert not moments.any()
                continue
            if (factor, vector) in ((FACTOR_A, of_a), (FACTOR_B, of_b)):
                assert (value - held[factor, vector]).abs().max() > 2 * LR, "it was not exchanged"
            frozen = old["switch.freeze_steps_left"][factor, 0, vector].item() > 0
            grad = (layer.lora_a if factor == FACTOR_A else layer.lora_b).grad[vector]
            grad = torch.zeros_like(grad) if frozen else grad
            assert steps == old_steps + 1
            expected = torch.stack(
                [0.9 * old_moments[0] + 0.1 * grad, 0.999 * old_moments[1] + 0.001 * grad**2]
            )
            torch.testing.assert_close(moments, expected, rtol=0, atol=1e-15)  # rounding


@pytest.mark.parametrize("reset_moments", ["counterpart", "momentum", "both", "none"])
def test_moments_are_reset_for_whom_the_setting_names(reset_moments):
    """A gradient of one everywhere: the second moment tells how many unfrozen steps a vector has seen since it was reset."""
    layer = build_layer(9, 14, RANK, 0.5, torch.float64)
    config = SwitchLoraConfig(
        rank=RANK, interval=RANK, freeze_steps=2, decay="constant", reset_moments=reset_moments
    )
    optimizer = build_optimizer(config, AdamWConfig(lr=LR), [layer], 20)
    for p in range(15):
        before = vectors(layer)
        set_gradients([layer], 1.0)
        optimizer.step()
        state, after = optimizer.state_dict(), vectors(layer)
        switched = {(FACTOR_A, p % RANK), (FACTOR_B, (RANK // 2 + p) % RANK)}
        counterpart = {(FACTOR_B, p % RANK), (FACTOR_A, (RANK // 2 + p) % RANK)}
        expected = {"counterpart": counterpart, "both": counterpart | switched}.get(
            reset_moments, set()
        )
        first_steps = {
            (factor, vector)
            for factor in (FACTOR_A, FACTOR_B)
            for vector in range(RANK)
            if moments_of(state, factor, vector)[1] == 1
        }
        # In the first step, no vector has seen more than one.
        assert p == 0 or first_steps == expected
        for vector in counterpart:
            assert torch.equal(before[vector], after[vector]), "it stands still, reset or not"
            first_moment, second_moment = moments_of(state, *vector)[0]
            assert first_moment.any() == (reset_moments == "none" and p > 0)
            assert second_moment.any() == (reset_moments in ("none", "momentum") and p > 0)
        for factor, vector in switched:
            if reset_moments == "both":  # the moments of one step with a gradient of one
                moments = moments_of(state, factor, vector)[0]
                expected_moments = torch.tensor([[0.1], [0.001]], dtype=torch.float64).expand_as(
                    moments
                )
                torch.testing.assert_close(
                    moments, expected_moments, rtol=0, atol=1e-15
                )  # rounding


def test_timer_started_again_counts_from_the_start():
    timers = FreezeTimers(num_layers=2, rank=5, freeze_steps=3, device=torch.device("cpu"))
    run = VectorSpan(FACTOR_B, 1, range(3, 5))
    timers.start([run])
    timers.advance()
    timers.start([run, VectorSpan(FACTOR_A, 0, range(1))])
    standing = ~timers.update_mask()
    assert standing.nonzero().tolist() == [[FACTOR_A, 0, 0], [FACTOR_B, 1, 3], [FACTOR_B, 1, 4]]
    for _ in range(3):
        assert torch.equal(~timers.update_mask(), standing)
        timers.advance()
    assert timers.update_mask().all()

"""A switch keeps a layer's output, freezes the counterparts and resets their optimizer state."""

import pytest
import torch
from support.switchlora_layers import (
    build_layer,
    build_optimizer,
    effective_weight,
    freeze_steps_left,
    relative_change,
    set_gradients,
    vector_steps,
    with_interval,
)
from support.tiny import tiny_trainer, train_steps

from switchtitan.distributed.fsdp import free_gathered_weights
from switchtitan.distributed.shards import local
from switchtitan.methods.lowrank import LowRankLinear, low_rank_layers, rounding
from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.plan import FACTOR_A, FACTOR_B
from switchtitan.optim import AdamWConfig

# (out, in, rank): wide, tall and with a rank near the number of candidates
SHAPES = [(5, 7, 2), (23, 14, 9), (31, 64, 30), (64, 48, 13)]
ADAMW = AdamWConfig(lr=1e-3)


def switching_layer(shape, dtype, seed, num_per_step=1, num_steps=500, alpha=1.0):
    """A layer whose optimizer only switches: learning rate 0 and gradients of zero."""
    out_features, in_features, rank = shape
    layer = build_layer(out_features, in_features, rank, alpha / rank, dtype, seed)
    config = with_interval(rank / num_per_step, rank=rank, freeze_steps=0, decay="constant")
    optimizer = build_optimizer(config, ADAMW, [layer], num_steps)
    optimizer.set_lr(0.0)
    set_gradients([layer], 0.0)
    return layer, optimizer


@pytest.mark.parametrize(
    ("dtype", "alpha", "bound"),
    # float64 rounding errors, enlarged by W and s B A that cancel with a large alpha.
    # In fp32 with alpha 1: rounding errors of 6e-8 of each element.
    [(torch.float64, 1.0, 1e-12), (torch.float64, 20.0, 1e-12), (torch.float32, 1.0, 1e-7)],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_switch_keeps_the_effective_weight(shape, dtype, alpha, bound):
    for seed in range(3):
        layer, optimizer = switching_layer(shape, dtype, seed, num_per_step=1 + seed, alpha=alpha)
        for _ in range(12):
            before, factors = effective_weight(layer), [layer.lora_a.clone(), layer.lora_b.clone()]
            optimizer.step()
            assert relative_change(effective_weight(layer), before) <= bound
            if optimizer.metrics()["switch/vectors_switched"]:
                assert not torch.equal(layer.lora_a, factors[0])
                assert not torch.equal(layer.lora_b, factors[1])
        assert optimizer.metrics()["switch/vectors_switched_total"] >= 12 * 2


@pytest.mark.parametrize("shape", SHAPES[1::2])
def test_five_hundred_steps_of_switching_keep_the_effective_weight(shape):
    layer, optimizer = switching_layer(shape, torch.float32, seed=1)
    before, frozen_before = effective_weight(layer), layer.weight.clone()
    optimizer.step()
    assert relative_change(layer.weight, frozen_before) > 1e-3, "nothing was folded into W"
    for _ in range(499):
        optimizer.step()
    assert optimizer.metrics()["switch/vectors_switched_total"] == 2 * 500
    # The promise; a random walk of 500 roundings of 6e-8 gives 1e-6.
    assert relative_change(effective_weight(layer), before) <= 1e-5


def to_nearest(values, bits):
    return values.bfloat16()


def towards_zero(values, bits):
    return (values.view(torch.int32) & -(2**16)).view(torch.float32).bfloat16()


@pytest.mark.parametrize(
    ("replaced", "is_biased"), [(None, False), (to_nearest, True), (towards_zero, True)]
)
def test_a_weight_in_bf16_keeps_the_effective_weight_in_the_mean(monkeypatch, replaced, is_biased):
    """Unbiased along the change, which rounding to nearest loses, and along W."""
    if replaced is not None:
        monkeypatch.setattr(rounding, "round_to_bf16", replaced)
    layer, optimizer = switching_layer((64, 48, 13), torch.float32, seed=3, alpha=0.01)
    # In [1, 2) and (-2, -1], where all values are 2^-7 apart.
    start = layer.weight.sign() * (
        1 + torch.rand(64, 48, generator=torch.Generator().manual_seed(0))
    )
    layer.weight.data = start.bfloat16()
    optimizer = build_optimizer(
        SwitchLoraConfig(rank=13, interval=13, freeze_steps=0, decay="constant"),
        ADAMW,
        [layer],
        500,
    )
    optimizer.set_lr(0.0)
    set_gradients([layer], 0.0)
    before, frozen_before = effective_weight(layer), layer.weight.double()
    for _ in range(13):
        optimizer.step()
    # All changes are below half of that.
    assert torch.equal(layer.weight, start.bfloat16()) == (replaced is to_nearest)
    drift = effective_weight(layer) - before
    folded_in = layer.weight.double() - drift - frozen_before
    is_off = [
        # As far as a random walk goes, not as a bias does: four deviations of the mean.
        (drift * direction.sign()).mean().abs() > 4 * drift.std() / drift.numel() ** 0.5
        for direction in (folded_in, frozen_before)
    ]
    assert any(is_off) == is_biased


def test_a_weight_in_bf16_is_rounded_by_the_seed():
    def weight_after_a_switch(seed):
        layer, _ = switching_layer((23, 14, 9), torch.float32, seed=3)
        layer.weight.data = layer.weight.data.bfloat16()
        config = SwitchLoraConfig(rank=9, interval=9, freeze_steps=0, decay="constant")
        build_optimizer(config, ADAMW, [layer], 20, seed=seed).switch()
        return layer.weight

    assert torch.equal(weight_after_a_switch(1), weight_after_a_switch(1))
    assert not torch.equal(weight_after_a_switch(1), weight_after_a_switch(2))


def test_full_turn_of_the_ring_brings_all_vectors_back():
    """Without training every vector returns to its slot after lcm(rank, candidates) switches."""
    layer, optimizer = switching_layer((6, 9, 4), torch.float64, seed=2)
    start = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for _ in range(12):  # the least common multiple of 4 vectors and 6 candidates
        optimizer.step()
    for name in ("lora_a", "lora_b", "candidates_a", "candidates_b"):
        assert torch.equal(layer.state_dict()[name], start[name]), name
    torch.testing.assert_close(
        layer.weight, start["weight"], rtol=0, atol=1e-14
    )  # float64 rounding


@pytest.fixture(scope="module")
def trained(corpora):
    """A tiny model after 12 training steps; every layer switched in nearly every step."""
    trainer = tiny_trainer(corpora / "switch", "switchlora")
    train_steps(trainer, 12)
    yield trainer.stepper
    trainer.stepper.close()


def unsharded(layer):
    """A plain layer of the same values, one rank holding all."""
    plain = LowRankLinear(
        layer.in_features, layer.out_features, layer.rank, layer.scale, layer.bounds
    )
    plain.load_state_dict(
        {name: local(getattr(layer, name)) for name in ("weight", "lora_a", "lora_b")}
    )
    return plain


def test_switch_of_a_trained_model_keeps_its_weights_and_logits(trained):
    model, optimizer = trained.model, trained.optimizer
    tokens = torch.randint(270, (3, 16), generator=torch.Generator().manual_seed(0))
    documents = torch.zeros(3, 16, dtype=torch.int32)

    def observe():
        with torch.no_grad():
            logits = model(tokens, documents)
        free_gathered_weights(model)
        layers = {name: unsharded(layer) for name, layer in low_rank_layers(model).items()}
        return logits, layers

    logits, layers = observe()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.set_lr(0.0)
    optimizer.step()
    optimizer.zero_grad()
    logits_after, layers_after = observe()

    num_switching = 0
    for name, layer in layers.items():
        before, after = effective_weight(layer), effective_weight(layers_after[name])
        num_switching += not torch.equal(layer.lora_a, layers_after[name].lora_a)
        assert relative_change(after, before) <= 1e-6, name
    assert num_switching >= len(layers) / 2
    assert optimizer.metrics()["switch/vectors_switched"] >= 2 * num_switching
    # Relative to logits of size one and more, the rounding of fp32 through two blocks.
    torch.testing.assert_close(
        logits_after, logits, rtol=1e-6, atol=1e-6 * logits.abs().max().item()
    )


RANK, LR = 6, 1e-2


def vectors(layer):
    """Copies of all vectors by (factor, index)."""
    return {
        (factor, i): row.clone()
        for factor, rows in ((FACTOR_A, layer.lora_a), (FACTOR_B, layer.lora_b))
        for i, row in enumerate(rows.detach())
    }


def record_run(freeze_steps, weight_decay=0.0, gradient=0.7, num_steps=40):
    """Run one layer that switches at most one vector per factor and step.

    Return (vectors before, after, p before, p after) of each step.
    """
    layer = build_layer(9, 14, RANK, 0.5, torch.float64)
    # A vector is switched or reset again after RANK // 2 switches, which is 13 steps or more.
    # By then it is no longer frozen.
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
    """After 5 steps of zero gradient, with betas 0.9 and 0.999, the update is 0.522 lr.

    (1 - b1) / (1 - b1^6) / sqrt((1 - b2) / (1 - b2^6)) = 0.522
    """
    expected = LR * 0.1 / (1 - 0.9**6) / (0.001 / (1 - 0.999**6)) ** 0.5
    assert expected == pytest.approx(0.52 * LR, rel=5e-3)
    record = record_run(freeze_steps=5)
    num_first_updates = 0
    for step, (_, _, *switched) in enumerate(record[:-5]):
        for vector in counterparts(*switched):
            before, after = record[step + 5][:2]
            # eps 1e-8 is small compared with a gradient of 0.7
            torch.testing.assert_close(
                after[vector], before[vector] - expected, rtol=0, atol=1e-7 * LR
            )
            num_first_updates += 1
    assert num_first_updates >= 8


def moments_of(state, steps, factor, vector):
    """[moments, elements] and the step count."""
    name = "lora_a" if factor == FACTOR_A else "lora_b"
    moments = [state[f"layer0.{name}.{key}"] for key in ("exp_avg", "exp_avg_sq")]
    return torch.stack([m[vector] for m in moments]), steps[factor, 0, vector].item()


def test_vector_switched_in_keeps_the_moments_and_the_steps_of_the_one_it_replaces():
    """Counterparts restart from zero state; all other vectors follow AdamW, switched or not."""
    layer = build_layer(9, 14, RANK, 0.5, torch.float64)
    config = SwitchLoraConfig(rank=RANK, interval=6, freeze_steps=2, decay="constant")
    optimizer = build_optimizer(config, AdamWConfig(lr=LR), [layer], 20)
    for _ in range(20):
        old = {key: tensor.clone() for key, tensor in optimizer.state_dict().items()}
        held, old_counts = vectors(layer), vector_steps(optimizer)
        for factor in (layer.lora_a, layer.lora_b):
            factor.grad = torch.randn_like(factor)
        optimizer.step()
        state, counts = optimizer.state_dict(), vector_steps(optimizer)
        p = int(old["switch.num_switched"])
        assert int(state["switch.num_switched"]) == p + 1
        of_a, of_b = p % RANK, (RANK // 2 + p) % RANK
        for (factor, vector), value in vectors(layer).items():
            moments, steps = moments_of(state, counts, factor, vector)
            old_moments, old_steps = moments_of(old, old_counts, factor, vector)
            if (factor, vector) in ((FACTOR_B, of_a), (FACTOR_A, of_b)):
                assert steps == 1
                assert not moments.any()
                continue
            if (factor, vector) in ((FACTOR_A, of_a), (FACTOR_B, of_b)):
                assert (value - held[factor, vector]).abs().max() > 2 * LR, "it was not exchanged"
            frozen = freeze_steps_left(old, 2)[factor, 0, vector].item() > 0
            grad = (layer.lora_a if factor == FACTOR_A else layer.lora_b).grad[vector]
            grad = torch.zeros_like(grad) if frozen else grad
            assert steps == old_steps + 1
            expected = torch.stack(
                [0.9 * old_moments[0] + 0.1 * grad, 0.999 * old_moments[1] + 0.001 * grad**2]
            )
            torch.testing.assert_close(moments, expected, rtol=0, atol=1e-15)  # rounding


@pytest.mark.parametrize("reset_moments", ["counterpart", "momentum", "both", "none"])
def test_moments_are_reset_for_whom_the_setting_names(reset_moments):
    """With gradients of one, the second moment counts a vector's unfrozen steps since its reset."""
    layer = build_layer(9, 14, RANK, 0.5, torch.float64)
    config = SwitchLoraConfig(
        rank=RANK, interval=RANK, freeze_steps=2, decay="constant", reset_moments=reset_moments
    )
    optimizer = build_optimizer(config, AdamWConfig(lr=LR), [layer], 20)
    for p in range(15):
        before = vectors(layer)
        set_gradients([layer], 1.0)
        optimizer.step()
        state, steps, after = optimizer.state_dict(), vector_steps(optimizer), vectors(layer)
        switched = {(FACTOR_A, p % RANK), (FACTOR_B, (RANK // 2 + p) % RANK)}
        counterpart = {(FACTOR_B, p % RANK), (FACTOR_A, (RANK // 2 + p) % RANK)}
        expected = {"counterpart": counterpart, "both": counterpart | switched}.get(
            reset_moments, set()
        )
        first_steps = {
            (factor, vector)
            for factor in (FACTOR_A, FACTOR_B)
            for vector in range(RANK)
            if steps[factor, 0, vector] == 1
        }
        # In the first step, no vector has seen more than one.
        assert p == 0 or first_steps == expected
        for vector in counterpart:
            assert torch.equal(before[vector], after[vector]), (
                "a frozen vector does not move, reset or not"
            )
            first_moment, second_moment = moments_of(state, steps, *vector)[0]
            assert first_moment.any() == (reset_moments == "none" and p > 0)
            assert second_moment.any() == (reset_moments in ("none", "momentum") and p > 0)
        for factor, vector in switched:
            if reset_moments == "both":  # the moments of one step with a gradient of one
                moments = moments_of(state, steps, factor, vector)[0]
                expected_moments = torch.tensor([[0.1], [0.001]], dtype=torch.float64).expand_as(
                    moments
                )
                torch.testing.assert_close(
                    moments, expected_moments, rtol=0, atol=1e-15
                )  # rounding

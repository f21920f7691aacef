"""A switch never changes what a layer computes."""

import pytest
import torch
from support.switchlora_layers import (
    build_layer,
    build_optimizer,
    effective_weight,
    relative_change,
    set_gradients,
)
from support.tiny import tiny_trainer, train_steps

from switchtitan.distributed.shards import local
from switchtitan.methods.lowrank import LowRankLinear, low_rank_layers, rounding
from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.switch import fold_into_weight_
from switchtitan.optim import AdamWConfig

# (out, in, rank): wide, tall and with a rank near the number of candidates
SHAPES = [(5, 7, 2), (23, 14, 9), (31, 64, 30), (64, 48, 13)]
ADAMW = AdamWConfig(lr=1e-3)


def switching_layer(shape, dtype, seed, num_per_step=1, num_steps=500, alpha=1.0):
    """A layer whose optimizer only switches: learning rate 0 and gradients of zero."""
    out_features, in_features, rank = shape
    layer = build_layer(out_features, in_features, rank, alpha / rank, dtype, seed)
    config = SwitchLoraConfig(
        rank=rank, interval=rank / num_per_step, freeze_steps=0, decay="constant"
    )
    optimizer = build_optimizer(config, ADAMW, [layer], num_steps)
    optimizer.set_lr(0.0)
    set_gradients([layer], 0.0)
    return layer, optimizer


@pytest.mark.parametrize(
    ("dtype", "alpha", "bound"),
    # Rounding of float64, enlarged by W and s B A that cancel with a large alpha; and, with alpha 1, what the method promises:
    # fp32 rounds to 6e-8 of each element.
    [(torch.float64, 1.0, 1e-12), (torch.float64, 20.0, 1e-12), (torch.float32, 1.0, 1e-7)],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_switch_keeps_the_effective_weight(shape, dtype, alpha, bound):
    for seed in range(4):
        layer, optimizer = switching_layer(shape, dtype, seed, num_per_step=1 + seed, alpha=alpha)
        for _ in range(12):
            before, factors = effective_weight(layer), [layer.lora_a.clone(), layer.lora_b.clone()]
            optimizer.step()
            assert relative_change(effective_weight(layer), before) <= bound
            if optimizer.metrics()["switch/vectors_switched"]:
                assert not torch.equal(layer.lora_a, factors[0])
                assert not torch.equal(layer.lora_b, factors[1])
        assert optimizer.metrics()["switch/vectors_switched_total"] >= 12 * 2


@pytest.mark.parametrize("shape", SHAPES)
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
    """Right with the direction of what is folded in, which rounding to nearest loses, and with that of W."""
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


def test_whole_turn_of_the_ring_brings_all_vectors_back():
    """Without training every vector returns to its slot as it was: after c switches, times rank over their common divisor."""
    layer, optimizer = switching_layer((6, 9, 4), torch.float64, seed=2)
    start = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for _ in range(12):  # the least common multiple of 4 vectors and 6 candidates
        optimizer.step()
    for name in ("lora_a", "lora_b", "candidates_a", "candidates_b"):
        assert torch.equal(layer.state_dict()[name], start[name]), name
    torch.testing.assert_close(
        layer.weight, start["weight"], rtol=0, atol=1e-14
    )  # float64 rounding


def test_fold_equals_the_change_of_the_product_element_by_element():
    torch.manual_seed(0)
    weight, counterparts_a, counterparts_b = torch.randn(5, 7), torch.randn(3, 7), torch.randn(5, 3)
    change_a, change_b, scale = torch.randn(3, 7), torch.randn(5, 3), 0.3
    expected = weight.clone()
    for o in range(5):
        for i in range(7):
            for k in range(3):
                expected[o, i] += scale * counterparts_b[o, k] * change_a[k, i]
                expected[o, i] += scale * change_b[o, k] * counterparts_a[k, i]
    vectors_a, vectors_b = (
        torch.cat([change_a, counterparts_a]),
        torch.cat([counterparts_b.T, change_b.T]),
    )
    fold_into_weight_(weight, vectors_a, vectors_b, scale)
    torch.testing.assert_close(weight, expected, rtol=0, atol=2e-6)  # six sums of size one in fp32


@pytest.fixture(scope="module")
def trained(corpora):
    """A tiny model after thirty steps of training, in which every layer switched in nearly every step."""
    trainer = tiny_trainer(corpora / "switch", "switchlora")
    train_steps(trainer, 30)
    yield trainer.stepper
    trainer.stepper.close()


def unsharded(layer):
    """A plain layer of the same values, one rank holding all."""
    plain = LowRankLinear(
        layer.in_features, layer.out_features, layer.rank, layer.scale, lambda *_: {}
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

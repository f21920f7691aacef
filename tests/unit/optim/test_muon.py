"""Muon steps as `torch.optim.Muon` and as its formula in fp64."""

import math

import pytest
import torch
from support.optimizer_steps import build, draw, limit_elements_per_call, parameters, train
from torch.optim.lr_scheduler import LambdaLR

from switchtitan.optim import muon
from switchtitan.optim.muon import MuonConfig, orthogonalize, orthogonalize_all

LR, OTHER_LR, DECAY, MOMENTUM = 0.03, 0.007, 0.2, 0.9
# Tall, wide, square, and two of one shape.
MATRICES = {
    "layers.0.up.weight": (9, 5),
    "layers.0.down.weight": (5, 9),
    "layers.0.square.weight": (6, 6),
    "layers.1.up.weight": (9, 5),
}
SHAPES = {
    "embed.weight": (11, 5),
    **MATRICES,
    "layers.0.norm.weight": (5,),
    "layers.0.other.weight": (4, 7),
    "head.weight": (11, 5),
}
BY_MUON = (*MATRICES, "layers.0.other.weight")
KEYS = {"lr": LR, "other_lr": OTHER_LR, "weight_decay": DECAY, "momentum": MOMENTUM}
NUM_STEPS = 12


def ours(named, compute_dtype=torch.float32, **keys):
    return build(MuonConfig(**(KEYS | keys)), named, MATRICES, compute_dtype=compute_dtype)


def lr_of(name):
    return LR if name in MATRICES else OTHER_LR


def by_formula(matrix, num_steps=5):
    """Newton-Schulz in fp64 on singular values: p(s) = a s + b s^3 + c s^5, from s / |S|."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / torch.linalg.vector_norm(s)
    for _ in range(num_steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh * 0.2 * math.sqrt(max(matrix.shape))


def train_by_formula(nesterov):
    """The matrices after `NUM_STEPS` steps in fp64, by Jordan et al.'s sums of gradients."""
    values = {name: parameters(SHAPES)[name].detach().double() for name in BY_MUON}
    sums = {name: torch.zeros_like(value) for name, value in values.items()}
    for step in range(NUM_STEPS):
        grads = draw(SHAPES, step)
        for name in BY_MUON:
            lr = lr_of(name) * (step + 1) / 12
            sums[name] = MOMENTUM * sums[name] + grads[name]
            update = grads[name] + MOMENTUM * sums[name] if nesterov else sums[name]
            values[name] = values[name] * (1 - lr * DECAY) - lr * by_formula(update)
    return values


def train_by_torch(nesterov):
    """The parameters after `NUM_STEPS` steps. Muon's products are in bf16."""
    named = parameters(SHAPES)
    matrices = [{"params": [named[name]], "lr": lr_of(name)} for name in BY_MUON]
    others = [named[name] for name in SHAPES if name not in BY_MUON]
    decayed = [{"params": [each], "weight_decay": DECAY * (each.ndim > 1)} for each in others]
    keys = {"momentum": MOMENTUM, "nesterov": nesterov, "weight_decay": DECAY}
    optimizers = (
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **keys),
        torch.optim.AdamW(decayed, lr=OTHER_LR, fused=True),
    )
    schedules = [LambdaLR(optimizer, lambda step: (step + 1) / 12) for optimizer in optimizers]
    for step in range(NUM_STEPS):
        for name, grad in draw(SHAPES, step).items():
            named[name].grad = grad
        for each in (*optimizers, *schedules):
            each.step()
    return named


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_in_fp32_equal_the_formula_in_fp64(nesterov):
    named, start = parameters(SHAPES), parameters(SHAPES)
    train(ours(named, nesterov=nesterov), named, range(NUM_STEPS))
    for name, expected in train_by_formula(nesterov).items():
        # Iterations multiply the rounding of small singular values, 6e-8, by up to 3.4^5 = 500.
        error = (named[name].detach() - expected).abs().max()
        assert error < 1e-4 * (expected - start[name].detach()).abs().max(), name
    # Shows that the check above can fail.
    other = train_by_formula(not nesterov)[name]
    assert (named[name].detach() - other).abs().max() > 1e-3


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_in_bf16_equal_torch_s_muon_to_rounding(nesterov):
    named, start = parameters(SHAPES), parameters(SHAPES)
    train(ours(named, torch.bfloat16, nesterov=nesterov), named, range(NUM_STEPS))
    exact = train_by_formula(nesterov)
    for name, expected in train_by_torch(nesterov).items():
        if name not in exact:
            assert torch.equal(named[name], expected), name
            continue
        moved = (expected - start[name]).abs().max()
        # torch's own difference from fp64 is of this size.
        error_of_torch = (expected - exact[name]).abs().max()
        assert 1e-4 * moved < error_of_torch < 0.05 * moved
        assert (named[name] - expected).abs().max() < 0.05 * moved, name


def test_large_batches_are_orthogonalized_in_parts(monkeypatch):
    batches = [torch.randn(5, 4, 6), torch.randn(1, 40, 50)]
    expected = orthogonalize_all(list(batches), num_steps=5)
    sizes = []

    def recorded(matrices, num_steps):
        sizes.append(len(matrices))
        return orthogonalize(matrices, num_steps)

    limit_elements_per_call(monkeypatch, muon, 50)
    monkeypatch.setattr(muon, "orthogonalize", recorded)
    for part, of_all in zip(orthogonalize_all(batches, num_steps=5), expected, strict=True):
        torch.testing.assert_close(part, of_all, rtol=1e-5, atol=1e-5)
    assert sizes == [2, 2, 1, 1]
    assert batches == []

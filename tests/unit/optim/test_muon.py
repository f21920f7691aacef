"""Muon steps as its formula in fp64."""

import math

import pytest
import torch
from support.optimizer_steps import build, draw, limit_elements_per_call, parameters, train

from switchtitan.optim import muon
from switchtitan.optim.adamw import AdamWConfig
from switchtitan.optim.muon import MuonConfig, orthogonalize

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


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("compute_dtype", "least", "most"),
    # Iterations multiply the rounding of small singular values, 6e-8, by up to 3.4^5 = 500.
    [(torch.float32, 0, 1e-4), (torch.bfloat16, 1e-4, 0.05)],
)
def test_steps_equal_the_formula_in_fp64_and_those_of_adamw(nesterov, compute_dtype, least, most):
    named, by_adamw, start = (parameters(SHAPES) for _ in range(3))
    train(ours(named, compute_dtype, nesterov=nesterov), named, range(NUM_STEPS))
    adamw = AdamWConfig(lr=LR, other_lr=OTHER_LR, weight_decay=DECAY)
    train(build(adamw, by_adamw, MATRICES), by_adamw, range(NUM_STEPS))
    exact = train_by_formula(nesterov)
    for name, value in named.items():
        if name not in exact:
            assert torch.equal(value, by_adamw[name]), name
            continue
        moved = (exact[name] - start[name]).abs().max()
        assert least * moved < (value - exact[name]).abs().max() < most * moved, name
    # Shows that the check above can fail.
    other = train_by_formula(not nesterov)[BY_MUON[0]]
    assert (named[BY_MUON[0]] - other).abs().max() > 1e-3


def test_matrices_of_a_large_model_are_updated_in_batches_like_those_of_a_small_one(monkeypatch):
    named, in_batches = parameters(SHAPES), parameters(SHAPES)
    train(ours(named, torch.float32), named, range(NUM_STEPS))
    sizes = []

    def recorded(matrices, num_steps):
        sizes.append(matrices.numel())
        return orthogonalize(matrices, num_steps)

    limit_elements_per_call(monkeypatch, muon, most := max(math.prod(SHAPES[n]) for n in BY_MUON))
    monkeypatch.setattr(muon, "orthogonalize", recorded)
    train(ours(in_batches, torch.float32), in_batches, range(NUM_STEPS))
    for name, value in named.items():
        torch.testing.assert_close(in_batches[name], value, rtol=1e-5, atol=1e-6)
    assert max(sizes) <= most < sum(sizes) / NUM_STEPS

"""Additions to weights in bf16 give the same bits compiled, for every weight, event and width."""

import math

import pytest
import torch

from switchtitan.methods.lowrank import LowRankLinear
from switchtitan.methods.lowrank.rounding import FrozenWeights


def not_finite():
    """Both infinities; then nan as CUDA makes it, with its sign set, and as the CPU makes it."""
    patterns = [0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFC00000]
    signed = [pattern - (pattern >> 31 << 32) for pattern in patterns]
    return torch.tensor(signed).int().view(torch.float32)


def draw_layers():
    generator = torch.Generator().manual_seed(0)
    layers = {name: LowRankLinear(5, 7, 3, 0.5, (0.4, 0.0)) for name in ("first", "second")}
    for layer in layers.values():
        layer.weight.data = torch.randn(7, 5, generator=generator).bfloat16()
    return layers


@torch.no_grad()
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_once_it_gives_the_same_bits_for_every_weight_event_and_width():
    model, compiled_model = draw_layers(), draw_layers()
    start, generator = model["second"].weight.clone(), torch.Generator().manual_seed(1)
    eager = FrozenWeights(model, 0, compile_step=False)
    compiled = FrozenWeights(compiled_model, 0, compile_step=True)
    for number in range(4):
        lora_a = 1e-3 * torch.randn(1 + number, 5, generator=generator)
        lora_b = torch.randn(1 + number, 7, generator=generator)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for weights in (eager, compiled):
                weights.add_products_(number, [(index, lora_a, lora_b) for index in range(2)])
    assert not torch.equal(model["second"].weight, start)
    for name, layer in model.items():
        # The compiler may fuse a multiplication and an addition into one rounding:
        # about one value in 2^16 may round differently.
        assert (compiled_model[name].weight != layer.weight).sum() <= 1
    weight = compiled_model["first"].weight
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled.add_products_(4, [(0, not_finite()[None], torch.ones(1, 7))])
    assert weight[:, :2].tolist() == [[math.inf, -math.inf]] * 7
    assert weight[:, 2:].isnan().all()

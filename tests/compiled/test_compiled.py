"""What Inductor generates for blocks, the loss and updates equals the uncompiled or a reference."""

import math

import pytest
import torch
from support.nonfinite import NOT_FINITE
from support.optimizer_steps import build, parameters, train
from support.small_llama import draw_batch, draw_model
from support.switchlora_layers import limit_factors, with_interval
from support.switchlora_runs import RANK, check_golden_trajectory, check_whole_run

from switchtitan.distributed.blocks import compile_if
from switchtitan.methods.adapter.linear import AdapterLinear
from switchtitan.methods.adapter.rounding import FrozenWeights
from switchtitan.methods.switchlora import SwitchLora, SwitchLoraConfig
from switchtitan.models.loss import CrossEntropy
from switchtitan.numerics.fixed_point import pack, unpack
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
    """Parameters after some steps; nothing compiles after the first one."""
    named = parameters(SHAPES)
    optimizer = build(config, named, compile_step=compile_step, compute_dtype=compute_dtype)
    train(optimizer, named, range(1))
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(optimizer, named, range(1, NUM_STEPS))
    return named


@pytest.mark.parametrize(
    ("compute_dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_muon_is_the_same_to_rounding(compute_dtype, tolerance):
    muon = MuonConfig(**KEYS)
    compiled, eager = (trained(muon, compiles, compute_dtype) for compiles in (True, False))
    for name, expected in eager.items():
        torch.testing.assert_close(compiled[name], expected, rtol=tolerance, atol=tolerance)


def test_the_golden_trajectory_of_switchlora_is_reproduced():
    check_golden_trajectory(compile_step=True)


@pytest.mark.usefixtures("float64")
def test_thirty_steps_of_switchlora_follow_the_rules_written_out_vector_by_vector(monkeypatch):
    limit_factors(monkeypatch, 3)  # some calls update fewer
    config = with_interval(4.3, rank=RANK, decay="exponential", decay_ratio=0.9, freeze_steps=2)
    check_whole_run(config, compile_step=True, num_steps=30)


def draw_layers(rounded):
    generator = torch.Generator().manual_seed(0)
    layers = {name: AdapterLinear(5, 7, 3, 0.5, (0.4, 0.0)) for name in ("first", "second")}
    for layer in layers.values():
        layer.weight.data = rounded(torch.randn(7, 5, generator=generator))
    return layers


@torch.no_grad()
@pytest.mark.parametrize("rounded", [torch.Tensor.bfloat16, pack])
def test_additions_to_weights_of_16_bits_compile_once_and_give_the_same_bits(rounded):
    model, compiled_model = draw_layers(rounded), draw_layers(rounded)
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
    compiled.add_products_(4, [(0, NOT_FINITE[None], torch.ones(1, 7))])
    weight = compiled_model["first"].weight
    if rounded is pack:
        assert not unpack(weight, torch.float32).isfinite().any()
        return
    assert weight[:, :2].tolist() == [[math.inf, -math.inf]] * 7
    assert weight[:, 2:].isnan().all()


def test_a_block_of_adapter_layers_and_the_loss_have_the_same_value_and_gradients():
    config = SwitchLoraConfig(rank=5, alpha=3)
    tokens, results = draw_batch(0), []
    for is_compiled in (False, True):
        model = draw_model(SwitchLora(config, 10, seed=3))
        loss = CrossEntropy(compile_regions=is_compiled)
        if is_compiled:
            model.blocks()["model.layers.0"].compile(fullgraph=True, dynamic=False)
        documents = torch.zeros_like(tokens, dtype=torch.int32)
        value = model(
            tokens, documents, lambda hidden, head, loss=loss: loss(hidden, head, tokens, 3)
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        results.append((value.detach(), *torch.autograd.grad(value, trained)))
    # Sums in another order, of terms of order 1, in fp32.
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_an_update_compiles_for_more_shapes_than_torch_admits_by_default():
    add_one = compile_if(True)(lambda x: x + 1)
    for size in range(1, 11):
        assert torch.equal(add_one(torch.zeros(size)), torch.ones(size))

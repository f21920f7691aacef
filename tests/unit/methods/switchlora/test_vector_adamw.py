"""AdamW per vector compared with torch's AdamW."""

from contextlib import nullcontext

import pytest
import torch
from torch._inductor import metrics
from torch._subclasses.fake_tensor import FakeTensorMode

from switchtitan.distributed.adjacent import allocate_adjacent
from switchtitan.methods.lowrank import LowRankLinear, lora_init
from switchtitan.methods.switchlora import factor_groups, vector_adamw
from switchtitan.methods.switchlora.vector_adamw import VectorAdamW
from switchtitan.optim import AdamWConfig

RANK, NUM_STEPS = 3, 25
SHAPES = {"first": (7, 5), "second": (4, 11)}
# Of parameters of size one: some roundings of each of 25 steps.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6}


def build_layers(dtype):
    torch.manual_seed(0)
    layers = {
        name: LowRankLinear(i, o, RANK, 0.5, lora_init).to(dtype) for name, (o, i) in SHAPES.items()
    }
    for layer in layers.values():
        for factor in (layer.lora_a, layer.lora_b):
            torch.nn.init.normal_(factor)
    return layers


def factors_of(layers):
    return [factor for layer in layers.values() for factor in (layer.lora_a, layer.lora_b)]


def all_moving(layers):
    return torch.ones(2, len(layers), RANK, dtype=torch.bool)


@pytest.mark.parametrize(
    ("dtype", "weight_decay", "compile_step"),
    [
        (torch.float64, 0.0, False),
        (torch.float64, 0.3, False),
        (torch.float32, 0.0, False),
        (torch.float32, 0.3, False),
        (torch.float32, 0.3, True),
    ],
)
def test_equals_torch_adamw_when_nothing_is_switched(dtype, weight_decay, compile_step):
    config = AdamWConfig(lr=0.05, betas=(0.8, 0.97), eps=1e-6, weight_decay=weight_decay)
    layers = build_layers(dtype)
    if compile_step:
        del layers["second"]  # every width is compiled by itself, for seconds
    optimizer = VectorAdamW(config, layers, compile_step)
    theirs = [factor.detach().clone().requires_grad_() for factor in factors_of(layers)]
    reference = torch.optim.AdamW(
        theirs, lr=0.05, betas=(0.8, 0.97), eps=1e-6, weight_decay=weight_decay
    )
    for step in range(NUM_STEPS):
        lr_factor = (step + 1) / NUM_STEPS
        optimizer.set_lr(lr_factor)
        reference.param_groups[0]["lr"] = 0.05 * lr_factor
        for ours, other in zip(factors_of(layers), theirs, strict=True):
            ours.grad = torch.randn_like(ours)
            other.grad = ours.grad.clone()
        optimizer.step(all_moving(layers))
        reference.step()
    for ours, other in zip(factors_of(layers), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=TOLERANCE[dtype])
    state = optimizer.state_dict()
    for index, (name, factor) in enumerate(
        (name, factor) for name in layers for factor in ("lora_a", "lora_b")
    ):
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                state[f"{name}.{factor}.{key}"],
                reference.state[theirs[index]][key],
                rtol=0,
                atol=TOLERANCE[dtype],
            )
    assert (optimizer.num_steps == NUM_STEPS).all()


def test_only_vectors_held_still_keep_their_value():
    layers = build_layers(torch.float32)
    optimizer = VectorAdamW(AdamWConfig(lr=0.05, weight_decay=0.3), layers, compile_step=False)
    moving = all_moving(layers)
    moving[0, 0, 1] = moving[1, 1, 2] = False  # a vector of the first A, one of the second B
    before = [factor.detach().clone() for factor in factors_of(layers)]
    for factor in factors_of(layers):
        factor.grad = torch.ones_like(factor)
    optimizer.step(moving)
    moved = [(factor != old) for factor, old in zip(factors_of(layers), before, strict=True)]
    expected = [torch.ones_like(mask) for mask in moved]
    expected[0][1] = False
    expected[3][2] = False
    for mask, wanted in zip(moved, expected, strict=True):
        assert torch.equal(mask, wanted)
    assert (optimizer.num_steps == 1).all(), "the count increases while a vector is frozen"


def test_zero_grad_forgets_gradients():
    layers = build_layers(torch.float32)
    optimizer = VectorAdamW(AdamWConfig(lr=0.05), layers, compile_step=False)
    for factor in factors_of(layers):
        factor.grad = torch.ones_like(factor)
    optimizer.zero_grad()
    assert all(factor.grad is None for factor in factors_of(layers))


@pytest.mark.parametrize("is_adjacent", [False, True])
@pytest.mark.parametrize("elements_per_call", [1, 2 * RANK * 5, 2**25])
def test_groups_of_any_size_and_place_compute_the_same(monkeypatch, elements_per_call, is_adjacent):
    monkeypatch.setattr(factor_groups, "_ELEMENTS_PER_CALL", elements_per_call)
    # Widths 5, 7 and 4: four factors, four and two.
    shapes = {"first": (7, 5), "second": (5, 7), "third": (4, 5), "fourth": (4, 7)}
    layers = {
        name: LowRankLinear(i, o, RANK, 0.5, lora_init).double() for name, (o, i) in shapes.items()
    }
    if is_adjacent:
        allocated = allocate_adjacent(factors_of(layers), torch.device("cpu"))
        for layer in layers.values():
            layer._apply(lambda tensor: allocated.get(tensor, tensor))
    torch.manual_seed(0)
    for factor in factors_of(layers):
        torch.nn.init.normal_(factor)
    optimizer = VectorAdamW(AdamWConfig(lr=0.05), layers, compile_step=False)
    theirs = [factor.detach().clone().requires_grad_() for factor in factors_of(layers)]
    reference = torch.optim.AdamW(theirs, lr=0.05, weight_decay=0.0)
    for _ in range(NUM_STEPS):
        for ours, other in zip(factors_of(layers), theirs, strict=True):
            ours.grad = torch.randn_like(ours)
            other.grad = ours.grad.clone()
        optimizer.step(all_moving(layers))
        reference.step()
    if elements_per_call > 1:
        assert is_adjacent == all(matrix is not None for matrix in optimizer._factors._matrices)
    for ours, other in zip(factors_of(layers), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=TOLERANCE[torch.float64])


def test_a_replaced_shard_is_found_again():
    layers = build_layers(torch.float32)
    allocated = allocate_adjacent(factors_of(layers), torch.device("cpu"))
    for layer in layers.values():
        layer._apply(lambda tensor: allocated.get(tensor, tensor))
    optimizer = VectorAdamW(AdamWConfig(lr=0.05), layers, compile_step=False)
    for factor in factors_of(layers):
        factor.grad = torch.ones_like(factor)
    optimizer.step(all_moving(layers))
    # As FSDP replaces the local shard of a DTensor.
    factors = optimizer._factors.factors
    factors[0] = torch.nn.Parameter(torch.ones_like(factors[0]))
    factors[0].grad = torch.ones_like(factors[0])
    optimizer.step(all_moving(layers))
    assert (factors[0] < 1).all()


def test_a_matrix_and_all_coefficients_take_one_kernel_each():
    torch._dynamo.reset()
    metrics.reset()
    layers = {str(index): LowRankLinear(5, 5, RANK, 0.5, lora_init) for index in range(3)}
    allocated = allocate_adjacent(factors_of(layers), torch.device("cpu"))
    for layer in layers.values():
        layer._apply(lambda tensor: allocated.get(tensor, tensor))
    for factor in factors_of(layers):
        factor.grad = torch.ones_like(factor)
    with torch._inductor.config.patch(force_disable_caches=True):
        VectorAdamW(AdamWConfig(lr=0.05), layers, compile_step=True).step(all_moving(layers))
    assert metrics.generated_kernel_count == 2


@pytest.mark.parametrize(("is_fake", "num_calls"), [(False, 3 + 3), (True, 2)])
def test_fake_tensors_are_updated_as_on_a_gpu(monkeypatch, is_fake, num_calls):
    """Estimates of memory and operations count the kernels of GPUs."""
    widths = []
    monkeypatch.setattr(vector_adamw, "_ELEMENTS_IN_CACHE", 1)
    update = vector_adamw.update_vectors_

    def update_and_count(vectors, *args, **keys):
        widths.append(vectors.shape[1])
        update(vectors, *args, **keys)

    monkeypatch.setattr(vector_adamw, "update_vectors_", update_and_count)
    with FakeTensorMode() if is_fake else nullcontext():
        layers = {"layer": LowRankLinear(7, 5, RANK, 0.5, lora_init)}
        optimizer = VectorAdamW(AdamWConfig(lr=0.1), layers, compile_step=False)
        for factor in factors_of(layers):
            factor.grad = torch.zeros_like(factor)
        optimizer.step(all_moving(layers))
    assert len(widths) == num_calls


def test_blocks_in_the_cpus_cache_compute_the_same(monkeypatch):
    torch.manual_seed(0)
    width, num_vectors = 5, 7
    matrices = [torch.rand(num_vectors, width) for _ in range(4)]
    coefficients = [torch.rand(num_vectors, 1) for _ in range(4)]
    whole = [tensor.clone() for tensor in matrices + coefficients]
    blocks = [tensor.clone() for tensor in matrices + coefficients]
    vector_adamw.update_vectors_(*whole, beta1=0.9, beta2=0.99)
    monkeypatch.setattr(vector_adamw, "_ELEMENTS_IN_CACHE", 3 * width)  # 3, 3 and 1 vectors
    vector_adamw.update_in_blocks_(*blocks, beta1=0.9, beta2=0.99)
    assert not torch.equal(whole[0], matrices[0])
    for found, expected in zip(blocks, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)

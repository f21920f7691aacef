"""The contractions compute the same, cost what the table says, and compile as one graph."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from switchtitan.methods.lowrank.contraction import (
    Contraction,
    cheapest_contraction,
    dense_gradient,
    factored,
    merged,
    num_flops,
)

CONTRACTIONS = [factored, merged, dense_gradient]
OUT, IN, RANK, SCALE = 7, 5, 3, 0.37
every_contraction = pytest.mark.parametrize("contraction", CONTRACTIONS, ids=lambda c: c.__name__)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(*leading: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    x, lora_a, lora_b = (
        draw(*shape, seed=seed, dtype=dtype).requires_grad_()
        for seed, shape in enumerate([(*leading, IN), (RANK, IN), (RANK, OUT)])
    )
    return x, draw(OUT, IN, seed=9, dtype=dtype), lora_a, lora_b


@every_contraction
@pytest.mark.parametrize("leading", [(11,), (2, 4), (2, 3, 2)])
def test_value_and_gradients_are_those_of_the_dense_weight(
    contraction: Contraction, leading: tuple[int, ...]
):
    x, weight, lora_a, lora_b = inputs(*leading)
    grad = draw(*leading, OUT, seed=4)
    expected = x @ (weight + SCALE * lora_b.T @ lora_a).T
    expected_grads = torch.autograd.grad(expected, (x, lora_a, lora_b), grad)
    weight.requires_grad_()
    out = contraction(x, weight, lora_a, lora_b, SCALE)
    out.backward(grad)
    assert weight.grad is None
    # fp64: sums of at most 12 terms of order 1 to 10, roundings of 1e-16.
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for tensor, expected_grad in zip((x, lora_a, lora_b), expected_grads, strict=True):
        torch.testing.assert_close(tensor.grad, expected_grad, rtol=1e-12, atol=1e-12)


@every_contraction
@pytest.mark.parametrize("without", ["x", "lora_a", "lora_b"])
def test_an_input_that_needs_no_gradient_gets_none(contraction: Contraction, without: str):
    named = dict(zip(("x", "weight", "lora_a", "lora_b"), inputs(6), strict=True))
    named[without].requires_grad_(False)
    contraction(*named.values(), SCALE).sum().backward()
    assert [name for name, tensor in named.items() if tensor.grad is not None] == [
        name for name in ("x", "lora_a", "lora_b") if name != without
    ]


@every_contraction
def test_the_table_counts_the_operations_of_forward_and_backward(contraction: Contraction):
    num_tokens = 11
    tensors = inputs(num_tokens)
    with FlopCounterMode(display=False) as counter:
        contraction(*tensors, SCALE).sum().backward()
    assert counter.get_total_flops() == num_flops(contraction, OUT, IN, RANK, num_tokens)


@pytest.mark.parametrize("shape", [(1024, 1024), (2736, 1024), (1024, 2736)])
@pytest.mark.parametrize("rank", [4, 128, 256, 512, 1000])
@pytest.mark.parametrize("num_tokens", [1, 64, 700, 2048, 36864])
def test_the_choice_costs_least(shape: tuple[int, int], rank: int, num_tokens: int):
    chosen = cheapest_contraction(*shape, rank, num_tokens)
    costs = [num_flops(contraction, *shape, rank, num_tokens) for contraction in CONTRACTIONS]
    assert num_flops(chosen, *shape, rank, num_tokens) == min(costs)


def test_every_contraction_is_the_cheapest_somewhere():
    assert cheapest_contraction(1024, 1024, 4, 64) is factored
    assert cheapest_contraction(1024, 1024, 256, 36864) is merged
    assert cheapest_contraction(1024, 1024, 1000, 36864) is dense_gradient


@every_contraction
def test_a_contraction_compiles_whole_forward_and_backward(contraction: Contraction):
    tensors = inputs(2, 4)
    torch._dynamo.reset()
    compiled = torch.compile(contraction, fullgraph=True, dynamic=False, backend="aot_eager")
    grads = []
    for function in (contraction, compiled):
        out = function(*tensors, SCALE)
        trained = [tensor for tensor in tensors if tensor.requires_grad]
        grads.append([out, *torch.autograd.grad(out.square().sum(), trained)])
    # The same operations in fp64; a decomposed addmm may round otherwise.
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("contraction", [merged, dense_gradient], ids=lambda c: c.__name__)
def test_only_the_inputs_are_kept_for_the_backward_pass(contraction: Contraction):
    tensors = inputs(6)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.data_ptr()) or t, lambda t: t
    ):
        contraction(*tensors, SCALE)
    assert set(kept) <= {tensor.data_ptr() for tensor in tensors}

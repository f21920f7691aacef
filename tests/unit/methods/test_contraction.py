"""The contractions compute the same, cost what the table says, and keep their inputs alone."""

import pytest
import torch
from support.observed import saved_besides
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from switchtitan.methods.lowrank.contraction import (
    concatenated,
    concatenated_pair,
    dense_gradient,
    factored,
    fastest_contraction,
    is_pair_faster,
    merged,
    num_flops,
)

CONTRACTIONS = [factored, merged, concatenated, dense_gradient]
OUT, IN, RANK, SCALE = 11, 7, 3, 0.37
every_contraction = pytest.mark.parametrize("contraction", CONTRACTIONS, ids=lambda c: c.__name__)


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def inputs(*leading):
    """x, W, A and B; all but W are trained."""
    shapes = [(*leading, IN), (RANK, IN), (RANK, OUT)]
    x, lora_a, lora_b = (draw(*shape, seed=n).requires_grad_() for n, shape in enumerate(shapes))
    return x, draw(OUT, IN, seed=9), lora_a, lora_b


def plain(x, weight, lora_a, lora_b, scale):
    """What autograd makes of the merged weight by itself."""
    return x @ (weight.to(x.dtype) + scale * (lora_b.t() @ lora_a)).t()


def compiled(function):
    """Trace and partition as for Inductor, whose code generation does not change saved tensors."""
    backend = "aot_eager_decomp_partition"
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


@every_contraction
@pytest.mark.parametrize("leading", [(11,), (2, 4), (2, 3, 2)])
def test_value_and_gradients_are_those_of_the_dense_weight(contraction, leading):
    tensors = x, weight, lora_a, lora_b = inputs(*leading)
    grad = draw(*leading, OUT, seed=4)
    expected = plain(*tensors, SCALE)
    expected_grads = torch.autograd.grad(expected, (x, lora_a, lora_b), grad)
    weight.requires_grad_()
    out = contraction(*tensors, SCALE)
    out.backward(grad)
    assert weight.grad is None
    # fp64: sums of at most 12 terms of order 1 to 10, roundings of 1e-16.
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for tensor, expected_grad in zip((x, lora_a, lora_b), expected_grads, strict=True):
        torch.testing.assert_close(tensor.grad, expected_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_a_pair_computes_what_two_dense_weights_do(is_compiled):
    x, weight, lora_a, lora_b = inputs(2, 4)
    other = [draw(5, IN, seed=20), *(draw(RANK, n, seed=n).requires_grad_() for n in (IN, 5))]
    trained, grads = (x, lora_a, lora_b, *other[1:]), [draw(2, 4, n, seed=n) for n in (OUT, 5)]
    function = compiled(concatenated_pair) if is_compiled else concatenated_pair
    out = function(x, (weight, lora_a, lora_b), tuple(other), SCALE)
    expected = [plain(x, weight, lora_a, lora_b, SCALE), plain(x, *other, SCALE)]
    # As above.
    torch.testing.assert_close(list(out), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(out, trained, grads),
        torch.autograd.grad(expected, trained, grads),
        rtol=1e-12,
        atol=1e-12,
    )


@every_contraction
@pytest.mark.parametrize("without", ["x", "lora_a", "lora_b"])
def test_an_input_that_needs_no_gradient_gets_none(contraction, without):
    named = dict(zip(("x", "weight", "lora_a", "lora_b"), inputs(6), strict=True))
    named[without].requires_grad_(False)
    contraction(*named.values(), SCALE).sum().backward()
    with_gradient = {name for name, tensor in named.items() if tensor.grad is not None}
    assert with_gradient == named.keys() - {"weight", without}


@every_contraction
def test_the_table_counts_the_operations_of_forward_and_backward(contraction):
    num_tokens = 11
    with FlopCounterMode(display=False) as counter:
        contraction(*inputs(num_tokens), SCALE).sum().backward()
    assert counter.get_total_flops() == num_flops(contraction, OUT, IN, RANK, num_tokens)


def test_on_a_cpu_the_choice_has_the_fewest_operations():
    chosen = set()
    for shape in [(1024, 1024), (2736, 1024), (1024, 2736)]:
        for rank in (4, 128, 256, 512, 1000):
            for num_tokens in (1, 64, 700, 2048, 36864):
                choice = fastest_contraction(torch.empty(num_tokens, shape[1]), shape[0], rank)
                costs = [num_flops(each, *shape, rank, num_tokens) for each in CONTRACTIONS]
                assert num_flops(choice, *shape, rank, num_tokens) == min(costs)
                chosen.add(choice)
    assert chosen == {factored, merged, dense_gradient}


@pytest.mark.parametrize(
    ("capability", "width", "rank", "dtype", "expected"),
    [
        # Bandwidth decides on an H100, operations in fp32 or where matrices are wide.
        ((9, 0), 512, 128, torch.bfloat16, dense_gradient),
        ((9, 0), 1024, 128, torch.bfloat16, concatenated),
        ((9, 0), 4096, 512, torch.bfloat16, merged),
        ((9, 0), 1024, 128, torch.float32, merged),
        ((8, 0), 512, 64, torch.bfloat16, concatenated),
    ],
)
def test_on_a_gpu_the_choice_has_the_least_time(
    monkeypatch, capability, width, rank, dtype, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        x = torch.empty(72, 512, width, dtype=dtype, device="cuda")
        assert fastest_contraction(x, width, rank) is expected
        assert is_pair_faster(x, (width, width), rank) == (expected is concatenated)


def shapes_saved(function, tensors):
    """Shapes of saved tensors that are not inputs."""
    out, saved = saved_besides(tensors, lambda: function(*tensors, SCALE))
    leaves = (tensors[0], tensors[2], tensors[3])
    grads = torch.autograd.grad(out.square().sum(), leaves)
    expected = torch.autograd.grad(plain(*tensors, SCALE).square().sum(), leaves)
    # Sums of some 10 products of order 1 to 100 in fp64, in another order.
    torch.testing.assert_close(grads, expected, rtol=1e-12, atol=1e-12)
    # Not a view that keeps a larger result.
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in saved)
    return [tuple(tensor.shape) for tensor in saved]


@every_contraction
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32])
@pytest.mark.usefixtures("fresh_compiler")
def test_nothing_but_inputs_and_the_thin_product_is_kept(contraction, is_compiled, weight_dtype):
    """Not the merged weight, and no cast of a weight of another dtype."""
    num_tokens = 2
    x, weight, lora_a, lora_b = inputs(num_tokens)
    # fp32 values, which the others' fp64 can hold: nothing is rounded.
    tensors = x, weight.float().to(weight_dtype), lora_a, lora_b
    saved = shapes_saved(compiled(contraction) if is_compiled else contraction, tensors)
    assert all(sorted(shape) == [num_tokens, RANK] for shape in saved)
    assert contraction in (factored, concatenated) or not saved
    if contraction is merged:
        # The control: plain autograd keeps it.
        function = compiled(plain) if is_compiled else plain
        assert {(OUT, IN), (IN, OUT)} & set(shapes_saved(function, tensors))

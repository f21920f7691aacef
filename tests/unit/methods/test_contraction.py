"""The contractions compute the same, cost what the table says, and keep little but inputs."""

import pytest
import torch
from support.insides import num_flops
from support.observed import saved_besides
from support.tensors import draw64
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from switchtitan.methods.adapter.contraction import (
    cheapest_contraction,
    dense_gradient,
    factored,
    merged,
)
from switchtitan.numerics.fixed_point import pack, unpack, values_of

CONTRACTIONS = [factored, merged, dense_gradient]
OUT, IN, RANK, SCALE = 11, 7, 3, 0.37
MANY_TOKENS = 150
"""So many that merged weights are kept: at least 32 OUT IN / (OUT + IN)."""
every_contraction = pytest.mark.parametrize("contraction", CONTRACTIONS, ids=lambda c: c.__name__)


def layer(out_features=OUT, seed=0):
    """W, which is not trained, A and B."""
    shapes = [(out_features, IN), (RANK, IN), (RANK, out_features)]
    weight, lora_a, lora_b = (draw64(*shape, seed=seed + n) for n, shape in enumerate(shapes))
    return weight, lora_a.requires_grad_(), lora_b.requires_grad_()


def input_of(*leading):
    return draw64(*leading, IN, seed=9).requires_grad_()


def trained(x, layers):
    return [x, *(tensor for _, *factors in layers for tensor in factors)]


def plain(x, layers, scale):
    """What autograd makes of the merged weights by itself."""
    return [
        x @ (values_of(weight, x.dtype) + scale * (lora_b.t() @ lora_a)).t()
        for weight, lora_a, lora_b in layers
    ]


def compiled(function):
    """Trace and partition as for Inductor, whose code generation does not change saved tensors."""
    backend = "aot_eager_decomp_partition"
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


@every_contraction
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(
    ("leading", "outs"),
    [
        *((leading, [OUT]) for leading in ((0,), (11,), (2, 4), (2, 3, 2), (2, MANY_TOKENS))),
        *((leading, [OUT, 5, 6]) for leading in ((2, 4), (2, MANY_TOKENS))),
    ],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_values_and_gradients_are_those_of_dense_weights(contraction, is_compiled, leading, outs):
    layers, x = [layer(out, seed=10 * out) for out in outs], input_of(*leading)
    grads = [draw64(*leading, out, seed=out) for out in outs]
    expected = plain(x, layers, SCALE)
    expected_grads = torch.autograd.grad(expected, trained(x, layers), grads)
    weight = layers[0][0].requires_grad_()
    outputs = (compiled(contraction) if is_compiled else contraction)(x, layers, SCALE)
    # fp64: sums of at most 300 terms of order 1 to 10, roundings of 1e-16.
    torch.testing.assert_close([*outputs], expected, rtol=1e-12, atol=1e-12)
    torch.autograd.backward(outputs, grads)
    assert weight.grad is None
    found = [tensor.grad for tensor in trained(x, layers)]
    torch.testing.assert_close(found, [*expected_grads], rtol=1e-12, atol=1e-12)


@every_contraction
@pytest.mark.parametrize("num_tokens", [11, MANY_TOKENS])
def test_packed_weights_compute_what_their_values_do(contraction, num_tokens):
    weight, *factors = layer()
    packed = pack(weight.float())
    results, grad = [], draw64(num_tokens, OUT, seed=1)
    for held in (packed, unpack(packed, torch.float64)):
        x = input_of(num_tokens)
        (output,) = contraction(x, [(held, *factors)], SCALE)
        results.append([output, *torch.autograd.grad(output, [x, *factors], grad)])
    assert all(map(torch.equal, *results))


@every_contraction
@pytest.mark.parametrize("without", ["x", "lora_a", "lora_b"])
def test_an_input_that_needs_no_gradient_gets_none(contraction, without):
    named = {"x": input_of(6), **dict(zip(("weight", "lora_a", "lora_b"), layer(), strict=True))}
    named[without].requires_grad_(False)
    x, *parts = named.values()
    contraction(x, [parts], SCALE)[0].sum().backward()
    with_gradient = {name for name, tensor in named.items() if tensor.grad is not None}
    assert with_gradient == named.keys() - {"weight", without}


@every_contraction
@pytest.mark.parametrize("num_tokens", [11, MANY_TOKENS])
def test_the_table_counts_the_operations_of_forward_and_backward(contraction, num_tokens):
    with FlopCounterMode(display=False) as counter:
        contraction(input_of(num_tokens), [layer()], SCALE)[0].sum().backward()
    assert counter.get_total_flops() == num_flops(contraction, OUT, IN, RANK, num_tokens)


def test_on_a_cpu_the_choice_has_the_fewest_operations():
    chosen = set()
    for shape in [(1024, 1024), (2736, 1024), (1024, 2736)]:
        for rank in (4, 128, 256, 512, 1000):
            for num_tokens in (1, 64, 700, 2048, 36864):
                choice = cheapest_contraction(torch.empty(num_tokens, shape[1]), shape[:1], rank)
                costs = [num_flops(each, *shape, rank, num_tokens) for each in CONTRACTIONS]
                assert num_flops(choice, *shape, rank, num_tokens) == min(costs)
                chosen.add(choice)
    assert chosen == {factored, merged, dense_gradient}


@pytest.mark.parametrize(
    ("capability", "width", "rank", "dtype", "expected"),
    [
        # Bandwidth decides on an H100, operations in fp32 or where matrices are wide.
        ((9, 0), 512, 128, torch.bfloat16, dense_gradient),
        ((9, 0), 1024, 128, torch.bfloat16, dense_gradient),
        ((9, 0), 4096, 512, torch.bfloat16, merged),
        ((9, 0), 1024, 128, torch.float32, merged),
        ((8, 0), 512, 64, torch.bfloat16, dense_gradient),
    ],
)
def test_on_a_gpu_the_choice_has_the_least_time(
    monkeypatch, capability, width, rank, dtype, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        x = torch.empty(72, 512, width, dtype=dtype, device="cuda")
        assert cheapest_contraction(x, (width,), rank) is expected


def shapes_saved(function, x, parts):
    """Shapes of saved tensors that are not inputs."""
    (out,), saved = saved_besides((x, *parts), lambda: function(x, [parts], SCALE))
    leaves = trained(x, [parts])
    grads = torch.autograd.grad(out.square().sum(), leaves)
    expected = torch.autograd.grad(plain(x, [parts], SCALE)[0].square().sum(), leaves)
    # Sums of some 10 products of order 1 to 100 in fp64, in another order.
    torch.testing.assert_close(grads, expected, rtol=1e-12, atol=1e-12)
    # Not a view that keeps a larger result.
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in saved)
    return [tuple(tensor.shape) for tensor in saved]


@every_contraction
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("held", [torch.Tensor.double, torch.Tensor.float, pack])
@pytest.mark.usefixtures("fresh_compiler")
def test_of_few_tokens_inputs_and_the_thin_product_are_kept(contraction, is_compiled, held):
    """Not the merged weight, and no cast of a weight of another dtype."""
    num_tokens = 2
    weight, *factors = layer()
    # fp32 values, which the others' fp64 can hold: nothing is rounded.
    case = input_of(num_tokens), (held(weight.float()), *factors)
    saved = shapes_saved(compiled(contraction) if is_compiled else contraction, *case)
    assert all(sorted(shape) == [num_tokens, RANK] for shape in saved)
    assert contraction is factored or not saved
    if contraction is merged and held is not pack:
        # The control: plain autograd keeps it.
        function = compiled(plain) if is_compiled else plain
        assert {(OUT, IN), (IN, OUT)} & set(shapes_saved(function, *case))


@pytest.mark.parametrize("contraction", [merged, dense_gradient])
def test_of_many_tokens_the_merged_weight_is_kept(contraction):
    assert shapes_saved(contraction, input_of(MANY_TOKENS), layer()) == [(OUT, IN)]

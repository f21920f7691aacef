"""What the contractions keep from the forward to the backward pass, compiled and not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from switchtitan.methods.lowrank.contraction import dense_gradient, factored, merged

pytestmark = pytest.mark.usefixtures("fresh_compiler")

OUT, IN, RANK, SCALE = 11, 7, 3, 0.3
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def draw_inputs(num_tokens: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shapes = ((num_tokens, IN), (OUT, IN), (RANK, IN), (RANK, OUT))
    x, weight, lora_a, lora_b = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return x.requires_grad_(), weight, lora_a.requires_grad_(), lora_b.requires_grad_()


def plain(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """What autograd makes of the merged weight by itself."""
    return x @ (weight.to(x.dtype) + scale * (lora_b.t() @ lora_a)).t()


def with_weight_of_another_type(inputs: Inputs) -> Inputs:
    """The weight in fp32, which the others' fp64 can hold, so that nothing is rounded."""
    return inputs[0], inputs[1].float(), inputs[2], inputs[3]


def saved_besides_inputs(function: Callable[..., Tensor], inputs: Inputs) -> list[tuple[int, ...]]:
    """Shapes of the saved tensors that share no memory with the inputs of the forward pass."""
    kept: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        out = function(*inputs, SCALE)
    leaves = (inputs[0], inputs[2], inputs[3])
    grads = torch.autograd.grad(out.square().sum(), leaves)
    expected = torch.autograd.grad(plain(*inputs, SCALE).square().sum(), leaves)
    # Sums of some 10 products of order 1 to 100 in fp64, in another order.
    torch.testing.assert_close(grads, expected, rtol=1e-12, atol=1e-12)
    held = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    shapes = [
        tuple(tensor.shape) for tensor in kept if tensor.untyped_storage().data_ptr() not in held
    ]
    assert len(shapes) < len(kept), "the hooks saw nothing, not even x"
    return shapes


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Trace and partition as for Inductor, whose code generation does not change saved tensors."""
    return torch.compile(
        function, fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition"
    )


@pytest.mark.parametrize("contraction", [merged, dense_gradient])
def test_nothing_but_the_inputs_is_kept(contraction):
    assert saved_besides_inputs(contraction, draw_inputs(9)) == []


@pytest.mark.parametrize("contraction", [merged, dense_gradient])
def test_nothing_but_the_inputs_is_kept_when_compiled(contraction):
    assert saved_besides_inputs(compiled(contraction), draw_inputs(9)) == []


@pytest.mark.parametrize("contraction", [merged, dense_gradient])
def test_the_cast_of_a_weight_of_another_type_is_not_kept(contraction):
    inputs = with_weight_of_another_type(draw_inputs(9))
    for function in (contraction, compiled(contraction)):
        assert saved_besides_inputs(function, inputs) == []


def test_the_factored_form_keeps_no_cast_of_the_weight_either():
    inputs = with_weight_of_another_type(draw_inputs(2))
    for function in (factored, compiled(factored)):
        assert all(sorted(shape) == [2, RANK] for shape in saved_besides_inputs(function, inputs))


def test_the_factored_form_keeps_only_its_thin_product():
    inputs = draw_inputs(2)
    for function in (factored, compiled(factored)):
        assert all(sorted(shape) == [2, RANK] for shape in saved_besides_inputs(function, inputs))


def test_plain_autograd_keeps_the_merged_weight():
    """Shows that the checks above would see it."""
    for inputs in (draw_inputs(9), with_weight_of_another_type(draw_inputs(9))):
        for function in (plain, compiled(plain)):
            assert {(OUT, IN), (IN, OUT)} & set(saved_besides_inputs(function, inputs))

"""Three ways to compute y = x (W + s B A)^T with gradients for x, A and B.

B is stored transposed, [rank, out]; a product that needs B takes a view. All agree to rounding and
differ in floating-point operations. For T tokens, forward and backward:

    factored        4 out in T + 6 rank (out + in) T
    merged          4 out in T + 4 rank (out + in) T + 4 out in rank
    dense gradient  6 out in T + 8 out in rank

`merged` and `dense_gradient` save only their inputs for the backward pass, compiled or not;
`factored` also saves x A^T. `weight` gets no gradient. Each pass casts a weight of another dtype.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Contraction = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""(x [..., in], weight [out, in], lora_a [rank, in], lora_b [rank, out], scale) -> [..., out]"""


def factored(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """Computes x W^T + s (x A^T) B^T."""
    return frozen_linear(x, weight) + F.linear(F.linear(x, lora_a), lora_b.t()) * scale


def frozen_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Computes x W^T in the dtype of x; saves only W for the backward pass."""
    return _FrozenLinear.apply(x, weight)


def merged(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """Multiplies x by W + s B A; the gradients of A and B are products of width rank."""
    return _MergedLinear.apply(x, weight, lora_a, lora_b, scale, False)


def dense_gradient(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    """Multiplies x by W + s B A; the gradients of A and B are projections of G = g^T x."""
    return _MergedLinear.apply(x, weight, lora_a, lora_b, scale, True)


_ALL: tuple[Contraction, ...] = (factored, merged, dense_gradient)
BY_NAME: dict[str, Contraction] = {contraction.__name__: contraction for contraction in _ALL}


def num_flops(
    contraction: Contraction, out_features: int, in_features: int, rank: int, num_tokens: int
) -> int:
    """Returns the floating-point operations of forward and backward, by the table above."""
    dense, factors = out_features * in_features, rank * (out_features + in_features)
    if contraction is factored:
        return 4 * dense * num_tokens + 6 * factors * num_tokens
    if contraction is merged:
        return 4 * dense * num_tokens + 4 * factors * num_tokens + 4 * dense * rank
    return 6 * dense * num_tokens + 8 * dense * rank


def cheapest_contraction(
    out_features: int, in_features: int, rank: int, num_tokens: int
) -> Contraction:
    """Returns the contraction with the fewest operations; of equal ones, the first in the table."""
    # Traced by torch.compile, which cannot take the minimum of a dictionary's values.
    return min(_ALL, key=lambda each: num_flops(each, out_features, in_features, rank, num_tokens))


def _merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    return torch.addmm(weight.to(lora_b.dtype), lora_b.t(), lora_a, alpha=scale)


# An opaque operation that depends on `grad`. Otherwise torch.compile moves the backward pass's
# merge, which depends on parameters alone, to the forward pass and saves the result. Registered by
# schema: a call through `torch.library.custom_op` takes the host several times as long.
_OPERATIONS = torch.library.Library("switchtitan", "DEF")
_OPERATIONS.define(
    "copy_in_backward(Tensor tensor, Tensor grad, bool casts=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


def _copy(tensor: Tensor, grad: Tensor, casts: bool = False) -> Tensor:
    return tensor.to(grad.dtype if casts else tensor.dtype, copy=True)


def _empty_copy(tensor: Tensor, grad: Tensor, casts: bool = False) -> Tensor:
    return torch.empty_like(tensor, dtype=grad.dtype if casts else tensor.dtype)


_OPERATIONS.impl("copy_in_backward", _copy, "CompositeExplicitAutograd")
_OPERATIONS.impl("copy_in_backward", _empty_copy, "Meta")
copy_in_backward: Callable[..., Tensor] = torch.ops.switchtitan.copy_in_backward.default
"""(tensor, gradient, casts=False) -> a copy of the tensor, in the dtype of the gradient if `casts`,
made in the backward pass, compiled or not. A part of the gradient will do."""


def _part(grad: Tensor) -> Tensor:
    """Returns a small view: torch.compile may copy what an opaque operation reads."""
    return grad.narrow(-1, 0, 1)


def _cast_in_backward(weight: Tensor, grad: Tensor) -> Tensor:
    if weight.dtype == grad.dtype:
        return weight
    return copy_in_backward(weight, _part(grad), casts=True)


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Returns s (left right), scaled inside the product: no other kernel reads the result."""
    unread = right[:1].expand(len(left), -1)
    return torch.addmm(unread, left, right, beta=0, alpha=scale)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        (weight,) = ctx.saved_tensors
        return grad @ _cast_in_backward(weight, grad) if ctx.needs_input_grad[0] else None, None


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
        has_dense_gradient: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, lora_a, lora_b)
        ctx.scale, ctx.has_dense_gradient = scale, has_dense_gradient
        return F.linear(x, _merge(weight, lora_a, lora_b, scale))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None, None]:
        x, weight, lora_a, lora_b = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            # Merged again: saving it in the forward pass would take [out, in] for every layer.
            own_weight = _cast_in_backward(weight, grad)
            own_b = copy_in_backward(lora_b, _part(grad))
            grad_x = grad @ _merge(own_weight, lora_a, own_b, ctx.scale)
        grad, x = grad.flatten(0, -2), x.flatten(0, -2)
        if ctx.has_dense_gradient:
            grad_weight = _scaled_product(grad.t(), x, ctx.scale)
            grad_a, grad_b = lora_b @ grad_weight, lora_a @ grad_weight.t()
        else:
            grad_a = _scaled_product((grad @ lora_b.t()).t(), x, ctx.scale)
            grad_b = _scaled_product((x @ lora_a.t()).t(), grad, ctx.scale)
        return grad_x, None, grad_a, grad_b, None, None

"""Three ways to compute y = x (W + s B A)^T with gradients for x, A and B.

B is stored transposed, [rank, out]; a product that needs B takes a view. All agree to rounding and
differ in floating-point operations. For T tokens, forward and backward:

    factored        4 out in T + 6 rank (out + in) T
    merged          4 out in T + 4 rank (out + in) T + 4 out in rank
    dense gradient  6 out in T + 8 out in rank

`merged` and `dense_gradient` save only their inputs for the backward pass, compiled or not;
`factored` also saves x A^T. `weight` gets no gradient. If its dtype is not that of x and the
factors, each pass casts it, and the copy is not saved.
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
    """Computes x W^T in the dtype of x; saves only W [out, in] for the backward pass."""
    return _FrozenLinear.apply(x, weight)


def merged(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """Multiplies x by W + s B A; the gradients of A and B are products of width rank."""
    return _Merged.apply(x, weight, lora_a, lora_b, scale)


def dense_gradient(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    """Multiplies x by W + s B A; the gradients of A and B are projections of G = g^T x."""
    return _DenseGradient.apply(x, weight, lora_a, lora_b, scale)


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
    return min(
        _ALL,
        key=lambda contraction: num_flops(contraction, out_features, in_features, rank, num_tokens),
    )


def _merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    return torch.addmm(weight.to(lora_b.dtype), lora_b.t(), lora_a, alpha=scale)


def _grad_x(grad: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    # Merged again: saving it in the forward pass would take [out, in] for every layer.
    return grad @ _merge(
        _cast_in_backward(weight, grad), lora_a, copy_in_backward(lora_b, grad), scale
    )


def _cast_in_backward(weight: Tensor, grad: Tensor) -> Tensor:
    """Casts `weight` to the dtype of `grad`, in the backward pass, compiled or not."""
    return weight if weight.dtype == grad.dtype else _cast_copy_in_backward(weight, grad)


# Opaque operations that depend on `grad`. Otherwise torch.compile moves the merge of the backward
# pass, which depends on parameters alone, to the forward pass and saves the result. Registered by
# schema: a call through `torch.library.custom_op` takes the host several times as long.
_OPERATIONS = torch.library.Library("switchtitan", "DEF")


def _define_in_backward(
    name: str, compute: Callable[[Tensor, Tensor], Tensor], allocate: Callable[..., Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Defines an operation (tensor, grad) -> tensor that shares no memory with its inputs.

    Args:
        allocate: computes only dtype, shape and strides of the result.
    """
    _OPERATIONS.define(
        f"{name}(Tensor tensor, Tensor grad) -> Tensor", tags=torch.Tag.pt2_compliant_tag
    )
    _OPERATIONS.impl(name, compute, "CompositeExplicitAutograd")
    _OPERATIONS.impl(name, allocate, "Meta")
    operation: Callable[[Tensor, Tensor], Tensor] = getattr(torch.ops.switchtitan, name).default
    return operation


copy_in_backward = _define_in_backward(
    "copy_in_backward",
    lambda factor, grad: factor.clone(),
    lambda factor, grad: torch.empty_like(factor),
)
"""(factor, gradient) -> a copy of the factor, made in the backward pass, compiled or not."""
_cast_copy_in_backward = _define_in_backward(
    "cast_copy_in_backward",
    lambda weight, grad: weight.to(grad.dtype, copy=True),
    lambda weight, grad: torch.empty_like(weight, dtype=grad.dtype),
)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        (weight,) = ctx.saved_tensors
        return grad @ _cast_in_backward(weight, grad) if ctx.needs_input_grad[0] else None, None


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, lora_a, lora_b)
        ctx.scale = scale
        return F.linear(x, _merge(weight, lora_a, lora_b, scale))

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        x, weight, lora_a, lora_b = ctx.saved_tensors
        grad_x = (
            _grad_x(grad, weight, lora_a, lora_b, ctx.scale) if ctx.needs_input_grad[0] else None
        )
        grad, x = grad.flatten(0, -2), x.flatten(0, -2)
        grad_a = ((grad @ lora_b.t()) * ctx.scale).t() @ x if ctx.needs_input_grad[2] else None
        grad_b = ((x @ lora_a.t()) * ctx.scale).t() @ grad if ctx.needs_input_grad[3] else None
        return grad_x, None, grad_a, grad_b, None


class _DenseGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, lora_a, lora_b)
        ctx.scale = scale
        return F.linear(x, _merge(weight, lora_a, lora_b, scale))

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        x, weight, lora_a, lora_b = ctx.saved_tensors
        grad_x = (
            _grad_x(grad, weight, lora_a, lora_b, ctx.scale) if ctx.needs_input_grad[0] else None
        )
        grad_weight = (grad.flatten(0, -2).t() @ x.flatten(0, -2)) * ctx.scale
        grad_a = lora_b @ grad_weight if ctx.needs_input_grad[2] else None
        grad_b = lora_a @ grad_weight.t() if ctx.needs_input_grad[3] else None
        return grad_x, None, grad_a, grad_b, None

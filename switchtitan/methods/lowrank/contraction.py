"""Four ways to compute y = x (W + s B A)^T with gradients for x, A and B.

B is stored transposed, [rank, out]; a product that needs B takes a view. All agree to rounding and
differ in floating-point operations and in the bytes that their products read and write. For T
tokens, forward and backward:

    factored        4 out in T + 6 rank (out + in) T
    merged          4 out in T + 4 rank (out + in) T + 4 out in rank
    concatenated    the same; reads x and the gradient as often as a linear layer does
    dense gradient  6 out in T + 8 out in rank

`merged` and `dense_gradient` save only their inputs for the backward pass, compiled or not;
`factored` and `concatenated` also save x A^T. `weight` gets no gradient. Each pass casts a weight
of another dtype.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

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


def concatenated(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """Computes [y | x A^T] in one product with the rows of W + s B A and A, and in the backward
    pass the gradients of x and x A^T in one with the columns of W + s B A and B."""
    return _ConcatenatedLinear.apply(x, weight, lora_a, lora_b, scale)


_ALL: tuple[Contraction, ...] = (factored, merged, concatenated, dense_gradient)
BY_NAME: dict[str, Contraction] = {contraction.__name__: contraction for contraction in _ALL}


def _products(
    contraction: Contraction, out_features: int, in_features: int, rank: int, num_tokens: int
) -> list[tuple[int, int, int]]:
    """Returns (m, k, n) of each product of [m, k] and [k, n], forward and backward."""
    forward = num_tokens, in_features, out_features
    backward = num_tokens, out_features, in_features
    of_factors = [(rank, num_tokens, in_features), (rank, num_tokens, out_features)]
    narrow = [(num_tokens, in_features, rank), (num_tokens, out_features, rank)]
    merges = 2 * [(out_features, rank, in_features)]
    if contraction is factored:
        wide = [(num_tokens, rank, out_features), (num_tokens, rank, in_features)]
        return [forward, backward, *narrow, *wide, *of_factors]
    if contraction is merged:
        return [forward, backward, *merges, *narrow, *of_factors]
    if contraction is concatenated:
        forward = num_tokens, in_features, out_features + rank
        backward = num_tokens, out_features, in_features + rank
        return [forward, backward, *merges, *of_factors]
    projections = [(rank, out_features, in_features), (rank, in_features, out_features)]
    return [forward, backward, (out_features, num_tokens, in_features), *merges, *projections]


def _products_of_pair(
    out_features: tuple[int, int], in_features: int, rank: int, num_tokens: int
) -> list[tuple[int, int, int]]:
    """Returns the products of `concatenated_pair`, like `_products`."""
    products = [(2 * rank, num_tokens, in_features)]
    for width in out_features:
        products += [
            (num_tokens, in_features, width + rank),
            (num_tokens, width, in_features + rank),
        ]
        products += [(rank, num_tokens, width), *2 * [(width, rank, in_features)]]
    return products


def num_flops(
    contraction: Contraction, out_features: int, in_features: int, rank: int, num_tokens: int
) -> int:
    """Returns the floating-point operations of forward and backward, by the table above."""
    products = _products(contraction, out_features, in_features, rank, num_tokens)
    return sum(2 * m * k * n for m, k, n in products)


def fastest_contraction(x: Tensor, out_features: int, rank: int) -> Contraction:
    """Returns the contraction with the least time by the roofline of the device of x [..., in].

    Of equal ones, the first in the table. On a CPU operations decide: measured, its narrow products
    are as fast as others.
    """
    in_features, num_tokens = x.shape[-1], x.numel() // x.shape[-1]
    best, least = _ALL[0], math.inf
    # Traced by torch.compile, which cannot take a minimum by a function that is made here.
    for contraction in _ALL:
        time = _time(x, _products(contraction, out_features, in_features, rank, num_tokens))
        if time < least:
            best, least = contraction, time
    return best


def is_pair_faster(x: Tensor, out_features: tuple[int, int], rank: int) -> bool:
    """Whether `concatenated_pair` takes less time than the fastest contraction of each layer."""
    if not x.is_cuda:  # it has the operations of two layers
        return False
    in_features, num_tokens = x.shape[-1], x.numel() // x.shape[-1]
    apart = 0.0
    for width in out_features:
        fastest = fastest_contraction(x, width, rank)
        apart += _time(x, _products(fastest, width, in_features, rank, num_tokens))
    return _time(x, _products_of_pair(out_features, in_features, rank, num_tokens)) < apart


def _time(x: Tensor, products: list[tuple[int, int, int]]) -> float:
    """Returns the time of products in the dtype of x, in units of floating-point operations."""
    flops_per_byte = _flops_per_byte(x.device, x.dtype) if x.is_cuda else 0.0
    time = 0.0
    for m, k, n in products:
        num_bytes = x.element_size() * (m * k + k * n + m * n)
        time += max(2 * m * k * n, num_bytes * flops_per_byte)
    return time


@torch.compiler.assume_constant_result
def _flops_per_byte(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the dense FLOP/s of products over the memory bandwidth in byte/s.

    H100 SXM: 989 TFLOP/s in bf16, 67 in fp32, 3.35 TB/s; A100: 312, 19.5 and 2.04 (NVIDIA's data
    sheets).
    """
    is_ampere = (8, 0) <= torch.cuda.get_device_capability(device) < (8, 9)
    if dtype == torch.float32:
        return 9.6 if is_ampere else 20.0
    return 153.0 if is_ampere else 295.0


def _merge(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, out: Tensor | None = None
) -> Tensor:
    return torch.addmm(weight.to(lora_b.dtype), lora_b.t(), lora_a, alpha=scale, out=out)


# Opaque operations. Registered by schema: a call through `torch.library.custom_op` takes the host
# several times as long.
_OPERATIONS = torch.library.Library("switchtitan", "DEF")


def _define(
    schema: str, compute: Callable[..., Tensor], allocate: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Returns an operation that computes, and for meta tensors allocates its result."""
    name = schema.partition("(")[0]
    tags = torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout
    _OPERATIONS.define(f"{schema} -> Tensor", tags=tags)
    _OPERATIONS.impl(name, compute, "CompositeExplicitAutograd")
    _OPERATIONS.impl(name, allocate, "Meta")
    operation: Callable[..., Tensor] = getattr(torch.ops.switchtitan, name).default
    return operation


def _copy(tensor: Tensor, grad: Tensor, casts: bool = False) -> Tensor:
    return tensor.to(grad.dtype if casts else tensor.dtype, copy=True)


def _empty_copy(tensor: Tensor, grad: Tensor, casts: bool = False) -> Tensor:
    return torch.empty_like(tensor, dtype=grad.dtype if casts else tensor.dtype)


# It depends on `grad`. Otherwise torch.compile moves the backward pass's merge, which depends on
# parameters alone, to the forward pass and saves the result.
copy_in_backward = _define(
    "copy_in_backward(Tensor tensor, Tensor grad, bool casts=False)", _copy, _empty_copy
)
"""(tensor, gradient, casts=False) -> a copy of the tensor, in the dtype of the gradient if `casts`,
made in the backward pass, compiled or not. A part of the gradient will do."""


def _merge_and_a(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    stack = _empty_rows(weight, lora_a)
    above, below = stack.split([len(weight), len(lora_a)])
    _merge(weight, lora_a, lora_b, scale, out=above)
    below.copy_(lora_a)
    return stack


def _empty_rows(weight: Tensor, lora_a: Tensor, *args: object) -> Tensor:
    return lora_a.new_empty(len(weight) + len(lora_a), lora_a.shape[1])


def _merge_and_b(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    grad: Tensor,
    scale: float,
    b_first: bool = False,
) -> Tensor:
    stack = _empty_columns(weight, lora_a)
    if b_first:
        of_b, merged_weight = stack.split([len(lora_b), weight.shape[1]], dim=1)
    else:
        merged_weight, of_b = stack.split([weight.shape[1], len(lora_b)], dim=1)
    _merge(weight, lora_a, lora_b, scale, out=merged_weight)
    of_b.copy_(lora_b.t())
    return stack


def _empty_columns(weight: Tensor, lora_a: Tensor, *args: object) -> Tensor:
    return lora_a.new_empty(len(weight), weight.shape[1] + len(lora_a))


def _multiply_pair(grad: Tensor, other_grad: Tensor, stack: Tensor, other_stack: Tensor) -> Tensor:
    result = _empty_pair(grad, other_grad, stack)
    left, right = result.flatten(0, -2).chunk(2, dim=1)
    torch.mm(grad.flatten(0, -2), stack, out=left)
    torch.mm(other_grad.flatten(0, -2), other_stack, out=right)
    return result


def _empty_pair(grad: Tensor, other_grad: Tensor, stack: Tensor, *args: object) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], 2 * stack.shape[1])


# Opaque, since torch.compile would copy both parts into the result.
_stack_rows = _define(
    "stack_rows(Tensor weight, Tensor lora_a, Tensor lora_b, float scale)",
    _merge_and_a,
    _empty_rows,
)
"""Returns the rows of W + s B A and A, [out + rank, in]."""
_stack_columns = _define(
    "stack_columns(Tensor weight, Tensor lora_a, Tensor lora_b, Tensor grad, float scale, "
    "bool b_first=False)",
    _merge_and_b,
    _empty_columns,
)
"""Returns the columns of W + s B A and B, [out, in + rank], or B first; in the backward pass, see
`copy_in_backward`."""
_pair_product = _define(
    "pair_product(Tensor grad, Tensor other_grad, Tensor stack, Tensor other_stack)",
    _multiply_pair,
    _empty_pair,
)
"""Returns both gradients' products with their stacks [out, width], [..., 2 width]."""


@register_flop_formula([torch.ops.switchtitan.stack_rows, torch.ops.switchtitan.stack_columns])
def _flops_of_merge(weight: torch.Size, lora_a: torch.Size, *args: object, **kwargs: object) -> int:
    return 2 * weight.numel() * lora_a[0]


@register_flop_formula([torch.ops.switchtitan.pair_product])
def _flops_of_pair(
    grad: torch.Size, other_grad: torch.Size, stack: torch.Size, *args: object, **kwargs: object
) -> int:
    return 2 * stack[1] * (grad.numel() + other_grad.numel())


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


def _with_thin(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns x (W + s B A)^T and x A^T of one product."""
    both = F.linear(x, _stack_rows(weight, lora_a, lora_b, scale))
    # Copied: a view of it would keep y in memory.
    return both[..., : len(weight)], both[..., len(weight) :].contiguous()


class _ConcatenatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
    ) -> Tensor:
        out, thin = _with_thin(x, weight, lora_a, lora_b, scale)
        ctx.save_for_backward(x, weight, lora_a, lora_b, thin)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        x, weight, lora_a, lora_b, thin = ctx.saved_tensors
        leading, in_features = x.shape[:-1], x.shape[-1]
        grad, x, thin = grad.flatten(0, -2), x.flatten(0, -2), thin.flatten(0, -2)
        both = grad @ _stack_columns(weight, lora_a, lora_b, _part(grad), ctx.scale)
        grad_x = both[:, :in_features].unflatten(0, leading) if ctx.needs_input_grad[0] else None
        grad_a = _scaled_product(both[:, in_features:].t(), x, ctx.scale)
        grad_b = _scaled_product(thin.t(), grad, ctx.scale)
        return grad_x, None, grad_a, grad_b, None


Factored = tuple[Tensor, Tensor, Tensor]
"""The weight [out, in], A [rank, in] and B [rank, out] of one layer."""


def concatenated_pair(
    x: Tensor, first: Factored, second: Factored, scale: float
) -> tuple[Tensor, Tensor]:
    """Computes `concatenated` for two layers of one input and rank.

    The gradients of both As are one product, which reads x once.
    """
    return _ConcatenatedPair.apply(x, *first, *second, scale)


class _ConcatenatedPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        weight, lora_a, lora_b, other_weight, other_a, other_b, ctx.scale = args
        out, thin = _with_thin(x, weight, lora_a, lora_b, ctx.scale)
        other_out, other_thin = _with_thin(x, other_weight, other_a, other_b, ctx.scale)
        ctx.save_for_backward(x, *args[:-1], thin, other_thin)
        return out, other_out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, other_weight, other_a, other_b, *thins = ctx.saved_tensors
        (rank, width), part = lora_a.shape, _part(grads[0])
        # Gradients of: x by the first layer | its x A^T | that of the other | x by the other.
        product = _pair_product(
            *grads,
            _stack_columns(weight, lora_a, lora_b, part, ctx.scale),
            _stack_columns(other_weight, other_a, other_b, part, ctx.scale, True),
        )
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = product[..., :width] + product[..., width + 2 * rank :]
        of_thin = product[..., width : width + 2 * rank].flatten(0, -2)
        grad_a, grad_other_a = _scaled_product(of_thin.t(), x.flatten(0, -2), ctx.scale).split(rank)
        grad_b, grad_other_b = (
            _scaled_product(thin.flatten(0, -2).t(), grad.flatten(0, -2), ctx.scale)
            for thin, grad in zip(thins, grads, strict=True)
        )
        return grad_x, None, grad_a, grad_b, None, grad_other_a, grad_other_b, None

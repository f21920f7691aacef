"""Three ways to compute y = x (W + s B A)^T with gradients for x, A and B; layers may share x.

B is stored transposed, [rank, out]; a product that needs B takes a view. All agree to rounding and
differ in floating-point operations and in the bytes that their products read and write. For T
tokens, forward and backward of one layer:

    factored        4 out in T + 6 rank (out + in) T
    merged          4 out in T + 4 rank (out + in) T + 4 out in rank
    dense gradient  6 out in T + 8 out in rank

`merged` and `dense_gradient` save only their inputs for the backward pass, compiled or not;
`factored` also saves x A^T. With so many tokens that W + s B A is small next to x and the outputs,
all but `factored` save it, which takes 2 out in rank operations less. `weight` gets no gradient. A
weight of another dtype is cast.

Of several layers, `merged` and `dense_gradient` compute all outputs but the last as one product,
and sum the gradients of x inside products.
"""

import functools
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from switchtitan.distributed.gpus import CARDS
from switchtitan.methods.operations import copy_in_backward, input_gradient, merge, part_of
from switchtitan.numerics.fixed_point import values_of

Factored = tuple[Tensor, Tensor, Tensor]
"""The weight [out, in] or its packed rows, A [rank, in] and B [rank, out] of one layer."""
Contraction = Callable[[Tensor, Sequence[Factored], float], tuple[Tensor, ...]]
"""(x [..., in], layers of one rank, scale) -> [..., out] of each."""


def factored(x: Tensor, layers: Sequence[Factored], scale: float) -> tuple[Tensor, ...]:
    """Computes x W^T + s (x A^T) B^T."""
    return tuple(
        frozen_linear(x, weight) + F.linear(F.linear(x, lora_a), lora_b.t()) * scale
        for weight, lora_a, lora_b in layers
    )


def frozen_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Computes x W^T in the dtype of x; saves only W for the backward pass."""
    return _FrozenLinear.apply(x, weight)


def merged(x: Tensor, layers: Sequence[Factored], scale: float) -> tuple[Tensor, ...]:
    """Multiplies x by W + s B A; the gradients of A and B are products of width rank."""
    return _MergedLinear.apply(x, scale, False, *chain(*layers))


def dense_gradient(x: Tensor, layers: Sequence[Factored], scale: float) -> tuple[Tensor, ...]:
    """Multiplies x by W + s B A; the gradients of A and B are projections of G = g^T x."""
    return _MergedLinear.apply(x, scale, True, *chain(*layers))


BY_NAME: dict[str, Contraction] = {
    contraction.__name__: contraction for contraction in (factored, merged, dense_gradient)
}


def _keeps_merged(out_features: Sequence[int], in_features: int, num_tokens: int) -> bool:
    """Whether merged weights take at most a 32nd of what x and the outputs do."""
    width = sum(out_features)
    return 32 * width * in_features <= num_tokens * (in_features + width)


def _products(
    name: str, out_features: int, in_features: int, rank: int, num_tokens: int
) -> list[tuple[int, int, int]]:
    """Returns (m, k, n) of each product of [m, k] and [k, n], forward and backward of one layer."""
    wide = [(num_tokens, in_features, out_features), (num_tokens, out_features, in_features)]
    narrow = [
        (num_tokens, in_features, rank),
        (num_tokens, out_features, rank),
        (rank, num_tokens, in_features),
        (rank, num_tokens, out_features),
    ]
    if name == "factored":
        return [*wide, *narrow, (num_tokens, rank, out_features), (num_tokens, rank, in_features)]
    num_merges = 1 if _keeps_merged([out_features], in_features, num_tokens) else 2
    merges = num_merges * [(out_features, rank, in_features)]
    if name == "merged":
        return [*wide, *merges, *narrow]
    projections = [(rank, out_features, in_features), (rank, in_features, out_features)]
    return [*wide, *merges, (out_features, num_tokens, in_features), *projections]


def cheapest_contraction(x: Tensor, out_features: tuple[int, ...], rank: int) -> Contraction:
    """Returns the contraction of x [..., in] that takes the least time by a roofline of its device,
    for layers that are computed together.

    Of equal ones, the first in the table. On a CPU operations decide: measured, its narrow products
    are as fast as others. `factored` for a graph that torch.compile makes for any number of tokens.
    """
    if torch.compiler.is_compiling() and not has_static_value(x.numel()):
        return factored
    num_tokens, value_size = x.numel() // x.shape[-1], x.element_size()
    flops_per_value = value_size * (_flops_per_byte(x.device, x.dtype) if x.is_cuda else 0.0)
    return BY_NAME[_cheapest(out_features, x.shape[-1], rank, num_tokens, flops_per_value)]


# Evaluated while torch.compile traces, not traced; the mark has no effect on a cached function.
@torch.compiler.assume_constant_result
def _cheapest(*args: Any) -> str:
    return _cheapest_of_shape(*args)


@functools.lru_cache
def _cheapest_of_shape(
    out_features: tuple[int, ...],
    in_features: int,
    rank: int,
    num_tokens: int,
    flops_per_value: float,
) -> str:
    """See `cheapest_contraction`; a value of a matrix takes the time of `flops_per_value`."""

    def time(name: str) -> float:
        return sum(
            max(2 * m * k * n, (m * k + k * n + m * n) * flops_per_value)
            for out in out_features
            for m, k, n in _products(name, out, in_features, rank, num_tokens)
        )

    return min(BY_NAME, key=time)


@torch.compiler.assume_constant_result
def _flops_per_byte(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP/s of products over the memory bandwidth: of an A100 for compute capability
    8.0 to 8.8, of an H100 for all others."""
    is_ampere = (8, 0) <= torch.cuda.get_device_capability(device) < (8, 9)
    card = CARDS["A100 80GB SXM" if is_ampere else "H100 SXM"]
    return card.flops_per_s(str(dtype).removeprefix("torch.")) / card.bandwidth


def _scaled_product(left: Tensor, right: Tensor, scale: float, factor: Tensor) -> Tensor:
    """Returns s (left right), scaled inside the product: no other kernel reads the result.
    `factor` has the width of `right`: addmm needs an input, which beta = 0 ignores."""
    unread = factor[:1].expand(len(left), -1)
    return torch.addmm(unread, left, right, beta=0, alpha=scale)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, values_of(weight, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        (weight,) = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None
        if weight.dtype != grad.dtype:
            weight = copy_in_backward(weight, part_of(grad), casts=True)
        return grad @ weight, None


def _multiply(x: Tensor, rows: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Returns the products of x with parts of the rows of a stack.

    All but the last are one product, whose memory they share. The last one, such as attention's
    values, may be kept for the backward pass, and keeps no other with it.
    """
    early = sum(lengths[:-1])
    outputs = F.linear(x, rows[:early]).split(lengths[:-1], -1) if early else ()
    return [*outputs, F.linear(x, rows[early:])]


class _MergedLinear(torch.autograd.Function):
    """`tensors`: W, A and B of each layer in turn."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: float, has_dense_gradient: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        weights, lora_a, lora_b = tensors[::3], tensors[1::3], tensors[2::3]
        stack, lengths = merge(weights, lora_a, lora_b, scale), [*map(len, weights)]
        keeps = _keeps_merged(lengths, x.shape[-1], x.numel() // x.shape[-1])
        ctx.save_for_backward(x, stack if keeps else None, *tensors)
        ctx.scale, ctx.has_dense_gradient = scale, has_dense_gradient
        return tuple(_multiply(x, stack, lengths))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, stack, *tensors = ctx.saved_tensors
        weights, lora_a, lora_b = tensors[::3], tensors[1::3], tensors[2::3]
        grad_x = None
        if ctx.needs_input_grad[0]:
            if stack is None:
                stack = merge(weights, lora_a, lora_b, ctx.scale, part_of(grads[0]))
            grad_x = input_gradient(grads, stack)
        x = x.flatten(0, -2)
        grads_of_layers: list[Tensor | None] = []
        for grad, a, b in zip(grads, lora_a, lora_b, strict=True):
            grad = grad.flatten(0, -2)
            if ctx.has_dense_gradient:
                grad_weight = _scaled_product(grad.t(), x, ctx.scale, a)
                grad_a, grad_b = b @ grad_weight, a @ grad_weight.t()
            else:
                grad_a = _scaled_product((grad @ b.t()).t(), x, ctx.scale, a)
                grad_b = _scaled_product((x @ a.t()).t(), grad, ctx.scale, b)
            grads_of_layers += [None, grad_a, grad_b]
        return grad_x, None, None, *grads_of_layers

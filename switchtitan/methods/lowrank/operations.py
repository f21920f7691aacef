"""Operations that torch.compile neither looks into nor moves to the forward pass.

A list has one tensor for each layer of one input: weights [out, in], A [rank, in], B [rank, out].
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Registered by schema: a call through `torch.library.custom_op` takes the host several times as
# long.
_OPERATIONS = torch.library.Library("switchtitan", "DEF")
IMPLEMENTATIONS: dict[object, Callable[..., Tensor]] = {}
"""Operation -> what it calls, in operations of torch."""


def define(schema: str, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns an operation that calls `compute`, on meta tensors too."""
    name = schema.partition("(")[0]
    tags = torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout
    _OPERATIONS.define(f"{schema} -> Tensor", tags=tags)
    _OPERATIONS.impl(name, compute, "CompositeExplicitAutograd")
    operation: Callable[..., Tensor] = getattr(torch.ops.switchtitan, name).default
    IMPLEMENTATIONS[operation] = compute
    return operation


def part_of(grad: Tensor) -> Tensor:
    """Returns a view of a gradient that is small enough to be copied, to depend on it."""
    return grad.narrow(-1, 0, 1)


def _copy(tensor: Tensor, grad: Tensor, casts: bool = False) -> Tensor:
    return torch.empty_like(tensor, dtype=grad.dtype if casts else tensor.dtype).copy_(tensor)


# It depends on `grad`. Otherwise torch.compile moves what depends on parameters alone from the
# backward to the forward pass and saves the result.
copy_in_backward = define("copy_in_backward(Tensor tensor, Tensor grad, bool casts=False)", _copy)
"""(tensor, gradient, casts=False) -> a copy of the tensor, in the dtype of the gradient if `casts`,
made in the backward pass, compiled or not. Pass `part_of` the gradient."""


def _merge(
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: float,
    with_factors: bool,
    grad: Tensor | None = None,
) -> Tensor:
    num_rows, (rank, in_features) = sum(map(len, weights)), lora_a[0].shape
    shape = (num_rows, in_features)
    if with_factors:
        shape = (num_rows + rank * len(weights), in_features + rank)
    stack = lora_a[0].new_empty(shape)
    rows = stack[:, :in_features]
    torch.cat([*weights, *lora_a] if with_factors else [*weights], out=rows)
    start = 0
    for weight, a, b in zip(weights, lora_a, lora_b, strict=True):
        rows[start : start + len(weight)].addmm_(b.t(), a, alpha=scale)
        start += len(weight)
    if with_factors:
        stack[: len(weights[0]), in_features:].copy_(lora_b[0].t())
    return stack


merge = define(
    "merge(Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, float scale, bool with_factors, "
    "Tensor? grad=None)",
    _merge,
)
"""Returns the rows of all W + s B A, [outs, in]. In the backward pass, pass `part_of` a gradient.

With factors, the rows of all A follow, and the columns of the first B:

    W_1 + s B_1 A_1  B_1
    W_2 + s B_2 A_2
          A_1
          A_2
"""


def _input_gradient(grads: Sequence[Tensor], stack: Tensor, lora_b: Sequence[Tensor]) -> Tensor:
    width, rank = stack.shape[1], len(lora_b[0]) if lora_b else 0
    result = grads[0].new_empty(*grads[0].shape[:-1], width + rank * (len(grads) - 1))
    (first, *others), out = [grad.flatten(0, -2) for grad in grads], result.flatten(0, -2)
    torch.mm(first, stack[: first.shape[1]], out=out[:, :width])
    start = first.shape[1]
    for number, grad in enumerate(others):
        rows = stack[start : start + grad.shape[1], : width - rank]
        out[:, : width - rank].addmm_(grad, rows)
        start += grad.shape[1]
        if rank:
            of_thin = out.narrow(1, width + number * rank, rank)
            torch.mm(grad, lora_b[number + 1].t(), out=of_thin)
    return result


input_gradient = define(
    "input_gradient(Tensor[] grads, Tensor stack, Tensor[] lora_b)", _input_gradient
)
"""Returns the gradient of the layers' input from those of their outputs [..., out].

It is summed inside products with `merge`'s stack. With each B, for a stack with factors, the
gradients of each x A^T without its scale follow, [..., in + layers * rank].
"""


@register_flop_formula(torch.ops.switchtitan.merge)
def _flops_of_merge(
    weights: list[torch.Size], lora_a: list[torch.Size], *args: object, **kwargs: object
) -> int:
    return sum(2 * weight.numel() * lora_a[0][0] for weight in weights)


@register_flop_formula(torch.ops.switchtitan.input_gradient)
def _flops_of_gradient(
    grads: list[torch.Size], stack: torch.Size, *args: object, **kwargs: object
) -> int:
    return sum(2 * grad.numel() * stack[1] for grad in grads)

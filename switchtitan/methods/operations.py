"""Operations that torch.compile neither looks into nor moves to the forward pass.

A list has one tensor for each layer of one input: weights [out, in], A [rank, in], B [rank, out].
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from switchtitan.numerics.fixed_point import FIXED, unpack

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
    if tensor.dtype == FIXED:
        return unpack(tensor, grad.dtype)
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
    grad: Tensor | None = None,
) -> Tensor:
    lengths = [*map(len, weights)]
    rows = lora_a[0].new_empty(sum(lengths), lora_a[0].shape[1])
    if weights[0].dtype != FIXED:
        torch.cat([*weights], out=rows)  # casts, if W has another dtype
    for weight, part, a, b in zip(weights, rows.split(lengths), lora_a, lora_b, strict=True):
        if weight.dtype == FIXED:
            unpack(weight, part.dtype, out=part)
        part.addmm_(b.t(), a, alpha=scale)
    return rows


merge = define(
    "merge(Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, float scale, Tensor? grad=None)",
    _merge,
)
"""Returns the rows of all W + s B A, [outs, in]. A backward pass passes `part_of` a gradient."""


def _input_gradient(grads: Sequence[Tensor], stack: Tensor) -> Tensor:
    first, *others = stack.split([grad.shape[-1] for grad in grads])
    # Not `@`, of which `benchmark gpu` counts no operations here.
    total = torch.mm(grads[0].flatten(0, -2), first)
    for grad, rows in zip(grads[1:], others, strict=True):
        total.addmm_(grad.flatten(0, -2), rows)
    return total.view(*grads[0].shape[:-1], stack.shape[1])


input_gradient = define("input_gradient(Tensor[] grads, Tensor stack)", _input_gradient)
"""Returns the gradient of the layers' input from those of their outputs [..., out], summed inside
products with `merge`'s rows."""


@register_flop_formula(torch.ops.switchtitan.merge)
def _flops_of_merge(
    weights: list[torch.Size], lora_a: list[torch.Size], *args: object, **kwargs: object
) -> int:
    return sum(2 * weight[0] * lora_a[0].numel() for weight in weights)


@register_flop_formula(torch.ops.switchtitan.input_gradient)
def _flops_of_gradient(
    grads: list[torch.Size], stack: torch.Size, *args: object, **kwargs: object
) -> int:
    return sum(2 * grad.numel() * stack[1] for grad in grads)

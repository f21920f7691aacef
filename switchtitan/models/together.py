"""Layers of one input, which may share its reads: of queries, keys and values, of gate and up."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Groupable(ABC):
    """A layer that may share the reads of its input with other layers of the same input."""

    @abstractmethod
    def forward_together(self, x: Tensor, others: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """Returns what this layer and the others return for x [..., in], equal to rounding."""


def apply_together(
    x: Tensor,
    first: nn.Module,
    second: nn.Module,
    *others: nn.Module,
    then: Callable[[Tensor], Tensor] = lambda y: y,
) -> tuple[Tensor, ...]:
    """Returns `then` of what the first two layers return for x [..., in], and what others return.

    The last output, at least, should be needed by the backward pass: it may be kept in memory.

    Args:
        then: [..., out] -> [..., out/n, *rest] for any `out`, each n features apart from others.
            For plain layers it may get both outputs concatenated: applied after the split, it would
            let torch.compile copy the gradients.
    """
    if isinstance(first, Groupable):
        one, two, *rest = first.forward_together(x, (second, *others))
    elif _is_plain(first) and _is_plain(second) and _is_joined_faster(x, first, second):
        return *joined(x, first, second, then), *(layer(x) for layer in others)
    else:
        one, two, *rest = (layer(x) for layer in (first, second, *others))
    return then(one), then(two), *rest


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the layer multiplies by its weight alone; a derived class may do anything."""
    return type(layer) is nn.Linear


def _is_joined_faster(x: Tensor, first: nn.Linear, second: nn.Linear) -> bool:
    # Uncompiled, the split's backward pass would copy the gradients.
    if not (x.is_cuda and torch.compiler.is_compiling() and torch.is_grad_enabled()):
        return False
    if (first.bias is None) != (second.bias is None):
        return False
    # Each pass copies both weights once; two reads of x, and a write and a read of its gradient,
    # are saved.
    return x.numel() // x.shape[-1] > first.out_features + second.out_features


def joined(
    x: Tensor, first: nn.Linear, second: nn.Linear, then: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """Returns `then` of two layers' outputs, from one product; see `apply_together`."""
    both, dim = then(joined_linear(x, first, second)), x.dim() - 1
    n = (first.out_features + second.out_features) // both.shape[dim]
    return both.split([first.out_features // n, second.out_features // n], dim)


def joined_linear(x: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    """Returns the outputs of two layers in one product: [..., in] -> [..., out + other out]."""
    both: Tensor = _JoinedLinear.apply(x, first.weight, second.weight)
    return both if first.bias is None else both + torch.cat((first.bias, second.bias))


class _JoinedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(x, first, second)
        return F.linear(x, torch.cat((first, second)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, first, second = ctx.saved_tensors
        grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        weight = torch.ops.switchtitan.join_rows(first, second, grad_weight[:1])
        return grad @ weight, *grad_weight.split([len(first), len(second)])


# Opaque, and depends on a gradient: otherwise torch.compile keeps the forward pass's result, which
# depends on parameters alone, for the backward pass.
_OPERATIONS = torch.library.Library("switchtitan", "FRAGMENT")
_OPERATIONS.define(
    "join_rows(Tensor first, Tensor second, Tensor grad) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_OPERATIONS.impl(
    "join_rows", lambda first, second, grad: torch.cat((first, second)), "CompositeExplicitAutograd"
)

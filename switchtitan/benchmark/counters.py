"""Contexts that count what happens inside: floating-point operations, and operations of torch."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from switchtitan.distributed.count_collectives import CountingMode


class CountOperations(CountingMode):
    """A context that counts torch's operations on this rank's tensors, but for views and bare
    allocations, which run nothing.

    An operation on a list of tensors counts once, though a device may take several kernels for it:
    CUDA takes one for every entry if they are not contiguous. So this is no count of kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = 0

    def count(self, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        self.num_operations += not (func.is_view or func.overloadpacket in _ALLOCATIONS)


class CountFlops(CountingMode):
    """A context that counts this rank's floating-point operations, those of backward passes
    included.

    A product of [m, k] and [k, n] is 2 m k n. Attention counts as in PaLM (arXiv 2204.02311,
    appendix B): two products forward and four backward, all scores of a causal mask, and nothing
    for what a fused kernel computes twice. Activations that are checkpointed do count twice.
    Element-wise operations, look-ups, and decompositions of matrices count nothing.

    Attributes:
        num_flops: of all that has happened inside so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_flops = 0

    def count(self, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        packet = getattr(func, "overloadpacket", func)
        packet = _IN_PLACE.get(packet, packet)
        if packet in _ATTENTION:
            self.num_flops += _ATTENTION[packet](*args)
        elif packet in flop_registry:
            self.num_flops += flop_registry[packet](*args, **kwargs, out_val=result)


def _attention_forward(query: Tensor, key: Tensor, value: Tensor, *_: object) -> int:
    """[batch, heads, seq, head_dim] each: scores, and values weighted by them."""
    return (
        2 * query.numel() * key.shape[-2]
        + 2 * query.numel() // query.shape[-1] * value.shape[-1] * key.shape[-2]
    )


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object) -> int:
    return 2 * _attention_forward(query, key, value)


_aten = torch.ops.aten
_ATTENTION: dict[object, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    _aten._scaled_dot_product_flash_attention: _attention_forward,
    _aten._scaled_dot_product_efficient_attention: _attention_forward,
    _aten._scaled_dot_product_cudnn_attention: _attention_forward,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    _aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
}
_IN_PLACE = {_aten.addmm_: _aten.addmm, _aten.baddbmm_: _aten.baddbmm}
"""What counts as its counterpart, which torch has a formula for."""
_ALLOCATIONS = (_aten.empty, _aten.new_empty, _aten.empty_like)

"""Counts the floating-point operations of a step."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from switchtitan.observability.collectives import CountingMode


class CountFlops(CountingMode):
    """A context that counts this rank's FLOPs, including backward passes.

    A product of [m, k] and [k, n] is 2 m k n. Attention is counted as in PaLM (arXiv 2204.02311,
    appendix B): two products forward and four backward, without reduction for a causal mask or
    recomputation inside a fused kernel. Recomputation of checkpointed activations is counted.
    Element-wise operations, look-ups and matrix decompositions are not counted.

    Attributes:
        num_flops: FLOPs so far.
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
    """[batch, heads, seq, head_dim] each: scores, and the weighted sum of values."""
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
"""In-place operation -> its counterpart, for which torch has a formula."""

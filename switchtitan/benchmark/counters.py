"""Counts the floating-point operations of a step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper

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
        formula = _FORMULAS.get(packet) or flop_registry.get(packet)
        if formula is not None:
            self.num_flops += formula(*args, **kwargs, out_val=result)


@shape_wrapper
def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


@shape_wrapper
def _attention_backward(grad: torch.Size, *forward: Any, **_: Any) -> int:
    return 2 * sdpa_flop_count(*forward[:3])


_aten = torch.ops.aten
_FORMULAS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten.baddbmm_: flop_registry[_aten.baddbmm],
}
"""Operations for which torch has no formula. A step is estimated on a CPU."""

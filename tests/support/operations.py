"""Counts torch operations."""

from collections.abc import Mapping
from typing import Any

import torch

from switchtitan.observability.collectives import CountingMode

_aten = torch.ops.aten
_ALLOCATIONS = (_aten.empty, _aten.new_empty, _aten.empty_like)


class CountOperations(CountingMode):
    """A context that counts torch operations on this rank's tensors, without views and allocations.

    An operation on a list of tensors counts once, although it may launch several kernels: CUDA
    launches one per entry if they are not contiguous. So this does not count kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = 0

    def count(self, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        self.num_operations += not (func.is_view or func.overloadpacket in _ALLOCATIONS)

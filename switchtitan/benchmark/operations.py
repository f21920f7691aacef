"""How many operations a piece of a program gives to the device."""

from collections.abc import Mapping
from typing import Any

import torch

from switchtitan.distributed.counting_mode import CountingMode


class CountOperations(CountingMode):
    """A context that counts torch's operations on this rank's tensors, but for views and bare allocations, which run nothing.

    An operation on a list of tensors counts once, though a device may take several kernels for it: CUDA takes one for every
    entry if they are not contiguous. So this is no count of kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = 0

    def count(self, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        self.num_operations += not (func.is_view or func.overloadpacket in _ALLOCATIONS)


_ALLOCATIONS = (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like)

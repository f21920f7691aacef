"""How many operations a piece of a program gives to the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


class CountOperations(TorchDispatchMode):
    """A context that counts torch's operations on this rank's tensors, but for views and bare allocations, which run nothing.

    An operation on a list of tensors counts once, though a device may take several kernels for it: CUDA takes one for every
    entry where they are not contiguous. So this is no count of kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # DTensor turns its operations into those of local tensors; they come here next.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        self.num_operations += not (func.is_view or func.overloadpacket in _ALLOCATIONS)
        return func(*args, **(kwargs or {}))


_ALLOCATIONS = (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like)

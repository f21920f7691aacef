"""Finds reads of the device's values, for which the host waits."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass_type,
)

from support.fake_cuda.lines import project_line
from support.fake_cuda.operations import is_on_cuda, tensors_in
from switchtitan.distributed.count_collectives import CountingMode

# These kernels check on the host whether they have converged.
_READ_INSIDE = {"_linalg_svd", "_linalg_eigh", "linalg_cholesky_ex", "linalg_lu_factor_ex"}


class FindHostReads(TorchDispatchMode):
    """A context that records every operation that reads a device tensor's value on the host.

    A number that is read is 1, or True: fake tensors have no values. Operations whose result's
    shape depends on values raise torch's `DynamicOutputShapeException`.

    Args:
        counters: count all other operations; they are not entered.

    Attributes:
        found: each operation, and the project's line that calls it.
    """

    def __init__(self, *counters: CountingMode) -> None:
        super().__init__()
        self._counters = counters
        self.found: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # A DTensor dispatches to operations on its local tensor.
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented
        name = func._opname if isinstance(func, torch._ops.OpOverload) else str(func)
        is_number = name == "_local_scalar_dense"
        if (is_number or name in _READ_INSIDE) and any(map(is_on_cuda, tensors_in(args))):
            self.found.append(f"{name} at {project_line()}")
            if is_number:
                return _one(args[0])
        result = func(*args, **(kwargs or {}))
        for counter in self._counters:
            counter.count(func, args, kwargs or {}, result)
        return result


def _one(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1

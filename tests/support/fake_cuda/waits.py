"""Finds what the host waits for: copies between host and device, and reads of its values."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

from support.fake_cuda.operations import is_on_cuda, project_line
from support.fake_cuda.python_api import pinned_memory
from switchtitan.workbench.benchmark.counters import CountingMode, tensors_in

_COPIES = ("aten::copy_", "aten::_to_copy", "aten::_foreach_copy_")
# They read a tensor's shape, not its values.
_ALLOCATIONS = ("aten::empty_like", "aten::new_empty", "aten::new_empty_strided")
# These copy even a host scalar to the device.
_COPYING_NUMBERS = ("aten::index_put_", "aten::index_put", "aten::_index_put_impl_")

# These kernels check on the host whether they have converged.
_READ_INSIDE = {"_linalg_svd", "_linalg_eigh", "linalg_cholesky_ex", "linalg_lu_factor_ex"}


class FindBlockingCopies(CountingMode):
    """A context that records every operation between host and device for which the host waits.

    The host waits for a copy unless it is non-blocking with page-locked host memory, and for a
    device operation with a host tensor, which is copied first. A host scalar (a 0-dim tensor) is a
    kernel argument. `found` has each operation, and the project's line that calls it.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def count(self, func, args, kwargs, result):
        inputs, outputs = tensors_in((args, kwargs)), tensors_in(result)
        if kwargs.get("pin_memory"):
            for tensor in outputs:
                pinned_memory.add(tensor)
        if {tensor.device.type for tensor in inputs + outputs} == {"cpu", "cuda"} and not _passes(
            func, args, kwargs, inputs + outputs
        ):
            self.found.append(f"{func} at {project_line()}")


def is_non_blocking(args, kwargs):
    """Whether a copy's arguments ask the host not to wait."""
    return bool(kwargs.get("non_blocking")) or True in args[2:]


def _passes(func, args, kwargs, tensors):
    """Whether the host does not wait."""
    name = func.name().split(".")[0]
    if name in _ALLOCATIONS:
        return True
    on_host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    if name in _COPIES:
        return is_non_blocking(args, kwargs) and all(tensor in pinned_memory for tensor in on_host)
    return name not in _COPYING_NUMBERS and all(tensor.ndim == 0 for tensor in on_host)


class FindHostReads(TorchDispatchMode):
    """A context that records every operation that reads a device tensor's value on the host.

    A number that is read is 1, or True: fake tensors have no values. Operations whose result's
    shape depends on values raise torch's `DynamicOutputShapeException`. `found` has each operation,
    and the project's line that calls it; counters, which are not entered, count all others.
    """

    def __init__(self, *counters):
        super().__init__()
        self._counters = counters
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
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


def _one(tensor):
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1

"""Counts the kernels that torch would launch on CUDA."""

from collections import Counter

from support.fake_cuda.operations import is_on_cuda
from switchtitan.benchmark.counters import CountingMode, tensors_in
from switchtitan.benchmark.gpu.record import (
    NO_KERNEL,
    lists_in,
    num_launches_of_lists,
    takes_fast_path,
)


class CountKernels(CountingMode):
    """A context that counts kernels that would launch on CUDA, including collectives and copies.

    Counts one for each operation except views and allocations. An operation on lists of tensors
    launches a few, or one per entry if torch's fast path does not apply.

    Attributes:
        counts: by the name of the operation; lists also say "fast" or "slow".
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def count(self, func, args, kwargs, result):
        if not any(map(is_on_cuda, tensors_in((args, kwargs, result)))):
            return
        namespace, _, name = func.name().split(".")[0].partition("::")
        if name.startswith("_foreach_"):
            lists = lists_in(args)
            path = "fast" if takes_fast_path(lists) else "slow"
            self.counts[f"{name} {path}"] += num_launches_of_lists(lists)
        # "prim" asks a tensor for its device.
        elif namespace != "prim" and not func.is_view and name not in NO_KERNEL:
            self.counts[name] += 1

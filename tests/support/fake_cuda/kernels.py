"""Counts the kernels that torch would launch on CUDA."""

import math
from collections import Counter

import torch

from support.fake_cuda.operations import is_on_cuda, tensors_in
from switchtitan.observability.collectives import CountingMode

# Of torch's multi_tensor_apply (aten/src/ATen/native/cuda/MultiTensorApply.cuh), by number of
# lists.
_TENSORS_PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_BLOCKS_PER_LAUNCH = 320
_ELEMENTS_PER_BLOCK = 65536

_NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "is_pinned",
    "lift_fresh",
    "record_stream",
}


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
            lists = [argument for argument in args if _is_list_of_tensors(argument)]
            if _takes_fast_path(lists):
                self.counts[f"{name} fast"] += _num_launches(lists)
            else:
                self.counts[f"{name} slow"] += len(lists[0])
        # "prim" asks a tensor for its device.
        elif namespace != "prim" and not func.is_view and name not in _NO_KERNEL:
            self.counts[name] += 1


def _is_list_of_tensors(argument):
    return (
        isinstance(argument, (list, tuple))
        and bool(argument)
        and isinstance(argument[0], torch.Tensor)
    )


def _takes_fast_path(lists):
    """Whether each list has one dtype, all tensors are dense, and entries of a position match.

    (aten/src/ATen/native/ForeachUtils.h)
    """
    return (
        all(len({tensor.dtype for tensor in tensors}) == 1 for tensors in lists)
        and all(tensor.is_contiguous() for tensors in lists for tensor in tensors)
        and all(
            len({(tensor.shape, tensor.stride()) for tensor in entries}) == 1
            for entries in zip(*lists, strict=True)
        )
    )


def _num_launches(lists):
    num_launches = num_tensors = num_blocks = 0
    for tensor in lists[0]:
        num_tensors += 1
        for _ in range(math.ceil(tensor.numel() / _ELEMENTS_PER_BLOCK)):
            num_blocks += 1
            if num_blocks == _BLOCKS_PER_LAUNCH:
                # The tensor that is split here is also in the next launch.
                num_launches, num_tensors, num_blocks = num_launches + 1, 1, 0
        if num_tensors == _TENSORS_PER_LAUNCH[len(lists)]:
            num_launches, num_tensors, num_blocks = num_launches + 1, 0, 0
    return num_launches + (num_blocks > 0)

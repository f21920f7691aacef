"""Tensors that every rank keeps whole, and changes by itself in the same way: whether they are still the same."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def check_replicas(tensors: Mapping[str, Tensor]) -> None:
    """Compares fingerprints of plain tensors, by name, over all ranks; all must call. Waits for the device.

    Raises:
        RuntimeError: on every rank, if a tensor differs; names the first few.
    """
    if not tensors or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    own = torch.stack([fingerprint(tensor) for tensor in tensors.values()])
    # The largest, and the complement of the smallest.
    extremes = torch.stack([own, ~own])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    differ = (extremes[0] != ~extremes[1]).tolist()
    differing = [name for name, differs in zip(tensors, differ, strict=True) if differs]
    if differing:
        rest = len(differing) - 4
        raise RuntimeError(
            f"ranks no longer hold the same frozen weights ({', '.join(differing[:4])}"
            f"{f' and {rest} more' if rest > 0 else ''}), so what they train is not one model; nothing is saved. "
            "Resume all ranks from the newest checkpoint, on devices of one kind, or set [parallelism] "
            'frozen_weights = "shard"'
        )


def fingerprint(tensor: Tensor) -> Tensor:
    """A 0-dim int64 that a change of any one value changes, and in all likelihood any other change, of places too."""
    bits = tensor.reshape(len(tensor), -1).view(_INTEGERS[tensor.element_size()])
    rows, columns = bits.sum(1, dtype=torch.int64), bits.sum(0, dtype=torch.int64)
    # Together each value has an odd factor, of which no bit of the value is lost; products and sums wrap around.
    row_factors = (2 * torch.arange(len(rows), device=rows.device) + 1) * _MULTIPLIERS[0]
    column_factors = 2 * torch.arange(len(columns), device=columns.device) * _MULTIPLIERS[1]
    return (rows * row_factors).sum() + (columns * column_factors).sum()


# 2^64 and 2^63 over the golden ratio, made odd.
_MULTIPLIERS = 0x9E3779B97F4A7C15 - 2**64, 0x4F1BBCDCBFA53E0B
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

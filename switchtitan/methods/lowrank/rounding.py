"""Adding products to frozen weights that may be kept in fewer bits than what is added.

A bf16 weight is rounded at random, up or down, so that the mean is the exact sum. To nearest, all that is smaller than half a
unit in the last place would be lost, change after change.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from switchtitan.distributed.seeds import generator_for
from switchtitan.distributed.shards import row_range
from switchtitan.methods.lowrank.linear import LowRankLinear
from switchtitan.methods.splitmix import splitmix32

_NUM_DROPPED_BITS = 16
"""Bits that fp32 has and bf16 has not."""


@dataclass(frozen=True)
class Rounding:
    """How one weight is rounded in one event."""

    key: Tensor
    """0-dim int32."""
    first_row: int
    """The place in the whole weight of the first row that this rank holds."""
    add_: Callable[..., None]
    """`add_rounded_`, perhaps compiled."""


class StochasticRounding:
    """The random bits by which weights in bf16 are rounded.

    They are a pure function of the seed, the weight's name, the event and the element's place in the whole weight: nothing is
    stored, and any number of ranks rounds alike.

    Args:
        layers: by qualified name; their weights are all of one dtype.
        seed: the job's.
        compile_step: fuse an update into one kernel.
    """

    def __init__(self, layers: Mapping[str, LowRankLinear], seed: int, compile_step: bool) -> None:
        self._first_rows = [row_range(layer.weight).start for layer in layers.values()]
        first = next(iter(layers.values()))
        self._keys: Tensor | None = None
        if first.weight.dtype != first.lora_a.dtype:
            # As many bits of the generator's own seed as a positive int32 holds.
            keys = [generator_for(seed, f"{name}.rounding").initial_seed() >> 32 for name in layers]
            self._keys = torch.tensor(keys, dtype=torch.int32, device=first.lora_a.device)
        self._add_ = (
            torch.compile(add_rounded_, fullgraph=True, dynamic=False)
            if compile_step
            else add_rounded_
        )

    def of_event(self, number: int) -> list[Rounding | None]:
        """For each weight; None for weights of their factors' dtype, which need no rounding.

        Args:
            number: of the event, below 2^31; no other may change these weights under the same one.
        """
        if self._keys is None:
            return [None] * len(self._first_rows)
        # Filled on the device: a copy of a number of the host's would make it wait.
        event = torch.full((), number, dtype=torch.int32, device=self._keys.device)
        keys = splitmix32(self._keys, event)
        return [
            Rounding(key, first_row, self._add_)
            for key, first_row in zip(keys.unbind(), self._first_rows, strict=True)
        ]


def add_product_(
    weight: Tensor, left: Tensor, right: Tensor, scale: float, rounding: Rounding | None
) -> None:
    """weight += scale * left right.

    Args:
        weight: [out, in], changed in place. A shard [out/ranks, in] works the same.
        left: [out, k], on the same rows as `weight`.
        right: [k, in].
        rounding: for a weight in bf16.
    """
    if rounding is None:
        weight.addmm_(left, right, alpha=scale)
    elif weight.numel():
        rounding.add_(weight, left @ right, rounding.key, first_row=rounding.first_row, scale=scale)


def add_rounded_(
    weight: Tensor, update: Tensor, key: Tensor, *, first_row: int, scale: float
) -> None:
    """weight += scale * update, summed in fp32 and rounded by `random_bits`.

    Args:
        weight: [rows, in] bf16, changed in place.
        update: [rows, in] fp32.
    """
    total = torch.add(weight.to(torch.float32), update, alpha=scale)
    weight.copy_(round_to_bf16(total, random_bits(key, first_row, *weight.shape)))


def round_to_bf16(values: Tensor, bits: Tensor) -> Tensor:
    """Rounds fp32 up in magnitude in as many of 2^16 cases as there are 2^-16ths of the way to the next bf16, else down.

    Over all `bits` in [0, 2^16) the mean is exactly `values`; what bf16 holds exactly stays as it is, inf and nan too.

    Args:
        bits: int32, of the same shape.
    """
    rounded = (values.view(torch.int32) + bits) & -(1 << _NUM_DROPPED_BITS)
    # The sum may carry out of the bits of a nan: CUDA's, 0x7fffffff, would come out as -0.
    kept = torch.where(values.isfinite(), rounded.view(torch.float32), values)
    return kept.to(torch.bfloat16)


def random_bits(key: Tensor, first_row: int, num_rows: int, num_columns: int) -> Tensor:
    """Whole numbers in [0, 2^16) for the elements of rows `first_row`, ... of a matrix, [num_rows, num_columns] int32.

    Args:
        key: 0-dim int32.
    """
    rows = torch.arange(first_row, first_row + num_rows, dtype=torch.int32, device=key.device)
    columns = torch.arange(num_columns, dtype=torch.int32, device=key.device)
    row_keys = splitmix32(key, rows)
    return splitmix32(row_keys.unsqueeze(1), columns) & ((1 << _NUM_DROPPED_BITS) - 1)

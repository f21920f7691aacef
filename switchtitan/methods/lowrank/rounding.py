"""Adds products to frozen weights, with stochastic rounding for weights in bf16.

Stochastic rounding is unbiased. Rounding to nearest would lose every change below half a unit in
the last place.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from switchtitan.distributed.blocks import compile_if
from switchtitan.distributed.random import generator_for, splitmix32
from switchtitan.distributed.shards import row_range
from switchtitan.methods.lowrank.linear import LowRankLinear

_NUM_DROPPED_BITS = 16
"""Bits of fp32 that bf16 lacks."""
_LOW_BITS = (1 << _NUM_DROPPED_BITS) - 1

AddProduct = Callable[[Tensor, Tensor, Tensor, float], None]
"""(weight [out, in], left [out, k], right [k, in], scale): adds scale * left right to the weight,
in place. A shard [out/ranks, in] works the same, with its rows of `left`."""


class StochasticRounding:
    """Rounds the weights of layers with random bits if they are in bf16.

    The bits are a pure function of the seed, the weight's name, the event, and the element's place
    in the full weight: nothing is stored, and the result does not depend on the number of ranks.

    Args:
        layers: by qualified name; their weights have one dtype.
        seed: the job's seed.
        compile_step: fuse an update into one kernel.
    """

    def __init__(self, layers: Mapping[str, LowRankLinear], seed: int, compile_step: bool) -> None:
        self._first_rows = [row_range(layer.weight).start for layer in layers.values()]
        first = next(iter(layers.values()))
        self._keys: Tensor | None = None
        if first.weight.dtype != first.lora_a.dtype:
            # The upper 31 bits of a generator's seed.
            keys = [generator_for(seed, f"{name}.rounding").initial_seed() >> 32 for name in layers]
            self._keys = torch.tensor(keys, dtype=torch.int32, device=first.lora_a.device)
        self._add: Callable[..., None] = compile_if(compile_step)(add_rounded_)

    def of_event(self, number: int) -> list[AddProduct]:
        """Returns what adds a product to each weight; without rounding to those of the factors'
        dtype.

        Args:
            number: of the event, below 2^31; two events must not share a number.
        """
        if self._keys is None:
            return [add_product_] * len(self._first_rows)
        # Filled on the device: a copy from the host would synchronize.
        event = torch.full((), number, dtype=torch.int32, device=self._keys.device)
        return [
            partial(add_rounded_product_, add=self._add, key=key, first_row=first_row)
            for key, first_row in zip(
                splitmix32(self._keys, event).unbind(), self._first_rows, strict=True
            )
        ]

    def replicated(self) -> dict[str, Tensor]:
        """Returns the weights' keys, which are the same on every rank; none without rounding."""
        return {} if self._keys is None else {"rounding_keys": self._keys}


def add_product_(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """An `AddProduct` without rounding."""
    weight.addmm_(left, right, alpha=scale)


def add_rounded_product_(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    scale: float,
    *,
    add: Callable[..., None],
    key: Tensor,
    first_row: int,
) -> None:
    """An `AddProduct` for a weight in bf16; `add` is `add_rounded_`, compiled or not."""
    if weight.numel():
        add(weight, left @ right, key, first_row=first_row, scale=scale)


def add_rounded_(
    weight: Tensor, update: Tensor, key: Tensor, *, first_row: int, scale: float
) -> None:
    """Adds scale * update to a weight, summed in fp32 and rounded by `random_bits`.

    Args:
        weight: [rows, in] bf16, changed in place.
        update: [rows, in] fp32.
    """
    total = torch.add(weight.to(torch.float32), update, alpha=scale)
    weight.copy_(round_to_bf16(total, random_bits(key, first_row, *weight.shape)))


def round_to_bf16(values: Tensor, bits: Tensor) -> Tensor:
    """Rounds fp32 values to bf16 stochastically.

    A value that is k / 2^16 of the way to the next bf16 in magnitude is rounded up for k of the
    2^16 values of `bits`, else down. The mean is exact. Values that bf16 represents, inf and nan
    are kept.

    Args:
        bits: int32 in [0, 2^16), of the same shape.
    """
    rounded = (values.view(torch.int32) + bits) & -(1 << _NUM_DROPPED_BITS)
    # The sum may overflow the bits of a nan: CUDA's 0x7fffffff would become -0.
    result = torch.where(values.isfinite(), rounded.view(torch.float32), values)
    return result.to(torch.bfloat16)


def random_bits(key: Tensor, first_row: int, num_rows: int, num_columns: int) -> Tensor:
    """Returns integers in [0, 2^16) for `num_rows` rows of a matrix from `first_row` on.

    Args:
        key: 0-dim int32.

    Returns:
        [num_rows, num_columns] int32.
    """
    rows = torch.arange(first_row, first_row + num_rows, dtype=torch.int32, device=key.device)
    columns = torch.arange(num_columns, dtype=torch.int32, device=key.device)
    return splitmix32(splitmix32(key, rows).unsqueeze(1), columns) & _LOW_BITS

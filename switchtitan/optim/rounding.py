"""Stochastic rounding to bf16, with random bits that depend on an element's place, not on its rank.

Stochastic rounding is unbiased. Rounding to nearest would lose every change below half a unit in
the last place.
"""

import torch
from torch import Tensor

from switchtitan.distributed.random import generator_for, splitmix32

_NUM_DROPPED_BITS = 16
"""Bits of fp32 that bf16 lacks."""
_LOW_BITS = (1 << _NUM_DROPPED_BITS) - 1


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


def rounding_key(seed: int, name: str) -> int:
    """Returns a positive int32 for a tensor's random bits, from the job's seed and a name."""
    # The upper 31 bits of the generator's seed.
    return generator_for(seed, f"{name}.rounding").initial_seed() >> 32


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

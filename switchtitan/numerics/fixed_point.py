"""16-bit fixed point for frozen weights: int16 values, with a power of two as the step of each row.

A packed row is its values, the step as the bits of a bf16 number, and zeros: int16 [rows, in +
NUM_EXTRA]. So sharding by rows keeps values next to their step, one tensor is gathered and saved,
and rows start at multiples of 16 bytes if those of the weight do.
"""

import torch
from torch import Tensor

from switchtitan.numerics.random import splitmix32

FIXED = torch.int16
"""dtype of packed rows."""
NUM_EXTRA = 8
"""Values of a packed row after those of the weight."""
_LARGEST = 32767
_LEAST_EXPONENT = -30
"""Of rows of zeros too."""
_NUM_BITS = 16
"""Random bits for each rounding."""


def pack(values: Tensor) -> Tensor:
    """Rounds fp32 rows [rows, in] to packed ones, [rows, in + NUM_EXTRA]: to the nearest multiple
    of the least step of which at most 2^15 - 1 are taken. A row with inf or nan has the step inf.
    """
    steps = _least_steps(values, _LEAST_EXPONENT)
    rows = torch.zeros(len(values), values.shape[1] + NUM_EXTRA, dtype=FIXED, device=values.device)
    _values(rows).copy_(torch.round(values / steps).clamp(-_LARGEST, _LARGEST))
    steps_of(rows).copy_(steps)
    return rows


def unpack(rows: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Returns the values of packed rows, rounded once to `dtype`."""
    return torch.mul(_values(rows), steps_of(rows).to(dtype), out=out)


def values_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a weight's values, packed or not, in `dtype`."""
    return unpack(weight, dtype) if weight.dtype == FIXED else weight.to(dtype)


def num_values(weight: Tensor) -> int:
    """Returns the number of a weight's values, packed or not."""
    return weight.numel() - (NUM_EXTRA * len(weight) if weight.dtype == FIXED else 0)


def steps_of(rows: Tensor) -> Tensor:
    """Returns a view of the steps of packed rows, bf16 [rows, 1]."""
    return rows[:, -NUM_EXTRA : 1 - NUM_EXTRA].view(torch.bfloat16)


def add_fixed_(
    rows: Tensor, update: Tensor, key: Tensor, *, first_row: Tensor | int, scale: float
) -> None:
    """Adds scale * update, fp32 [rows, in], to packed rows, rounded stochastically: unbiased.

    Only the update is rounded. A row that would overflow takes a larger step, and is rounded to it
    by further random bits. With inf or nan, all of it is inf or nan from then on.

    Args:
        key: 0-dim int32 of this addition; see `random_words`.
        first_row: place of the first row in the full weight.
    """
    values, steps = _values(rows), steps_of(rows)
    words = random_words(key, first_row, *update.shape)
    total = values + _round(update * scale / steps.to(update.dtype), words)
    growth = _least_steps(total, 0)
    values.copy_(_round(total / growth, words >> _NUM_BITS).clamp(-_LARGEST, _LARGEST))
    steps.mul_(growth)


def _values(rows: Tensor) -> Tensor:
    return rows[:, :-NUM_EXTRA]


def _least_steps(values: Tensor, least_exponent: int) -> Tensor:
    """Returns the least power of two by which each row [rows, in], divided, is below 2^15, but no
    less than 2^least_exponent; inf for a row with inf or nan. fp32 [rows, 1]."""
    largest = values.abs().amax(1, keepdim=True)
    exponents = (largest.view(torch.int32) >> 23) - (126 + 15)
    exponents = exponents.clamp(min=least_exponent).where(largest.isfinite(), 128)
    return ((exponents + 127) << 23).view(torch.float32)


def _round(values: Tensor, words: Tensor) -> Tensor:
    """Rounds values up or down to an integer by the lower bits of random words."""
    down = torch.floor(values)
    # The middle of the interval that k of the 2^16 values of the bits stand for.
    bits = (words & ((1 << _NUM_BITS) - 1)) + 0.5
    return down + ((values - down) * (1 << _NUM_BITS) > bits)


def random_words(key: Tensor, first_row: Tensor | int, num_rows: int, num_columns: int) -> Tensor:
    """Returns random int32 for rows of a matrix from `first_row` on, [num_rows, num_columns]: a
    function of the place in the matrix and the key, 0-dim int32."""
    rows = first_row + torch.arange(num_rows, dtype=torch.int32, device=key.device)
    columns = torch.arange(num_columns, dtype=torch.int32, device=key.device)
    return splitmix32(splitmix32(key, rows).unsqueeze(1), columns)

"""16-bit fixed point for frozen weights: int16 values, with a power of two as the step of each row.

A packed row is its values, the exponent of its step, and zeros: int16 [rows, in + NUM_EXTRA]. So
sharding by rows keeps values next to their step, one tensor is gathered and saved, and rows start
at multiples of 16 bytes if those of the weight do.
"""

import torch
from torch import Tensor

from switchtitan.distributed.random import splitmix32

FIXED = torch.int16
"""dtype of packed rows."""
NUM_EXTRA = 8
"""Values of a packed row after those of the weight."""
_LARGEST, _MOST_DOUBLINGS = 32767, 15
_LEAST_EXPONENT = -30
"""Of rows of zeros too: updates of up to 1 then fit into int32 steps."""
_NUM_BITS = 16
"""Random bits for each rounding."""


def pack(values: Tensor) -> Tensor:
    """Rounds fp32 rows [rows, in] to the nearest packed ones, [rows, in + NUM_EXTRA]."""
    # A row's largest magnitude is m 2^e with m < 1: divided by 2^(e - 15), it is below 2^15.
    largest = values.abs().amax(1, keepdim=True) if values.numel() else values.new_zeros(0, 1)
    exponents = (torch.frexp(largest).exponent - 15).clamp(min=_LEAST_EXPONENT)
    exponents = exponents.where(largest > 0, _LEAST_EXPONENT)
    rounded = torch.round(values / power_of_two(exponents)).clamp(-_LARGEST, _LARGEST)
    zeros = exponents.new_zeros(len(values), NUM_EXTRA - 1)
    return torch.cat([rounded.to(FIXED), exponents.to(FIXED), zeros.to(FIXED)], 1)


def unpack(rows: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Returns the values of packed rows, rounded once to `dtype`, in one kernel."""
    steps = power_of_two(rows[:, -NUM_EXTRA : 1 - NUM_EXTRA]).to(dtype)
    return torch.mul(rows[:, :-NUM_EXTRA], steps, out=out)


def power_of_two(exponents: Tensor) -> Tensor:
    """Returns 2^n in fp32, exactly, for integers n in [-126, 127]."""
    return ((exponents.to(torch.int32) + 127) << 23).view(torch.float32)


def add_fixed_(rows: Tensor, update: Tensor, key: Tensor, *, first_row: int, scale: float) -> None:
    """Adds scale * update, fp32 [rows, in], to packed rows, rounded stochastically: unbiased.

    Only the update is rounded. A row that would overflow takes a step twice as large, as often as
    needed, and is rounded to it by further random bits.

    Args:
        key: 0-dim int32 of this addition; see `random_words`.
        first_row: place of the first row in the full weight.
    """
    values, exponents = rows[:, :-NUM_EXTRA], rows[:, -NUM_EXTRA : 1 - NUM_EXTRA]
    words = random_words(key, first_row, *update.shape)
    steps = update * scale * power_of_two(-exponents.to(torch.int32))
    down = torch.floor(steps)
    # Of the 2^16 values that the bits have, k round up a fraction of k / 2^16.
    is_up = (steps - down) * (1 << _NUM_BITS) > (words & ((1 << _NUM_BITS) - 1))
    total = values.to(torch.int32) + down.to(torch.int32) + is_up
    largest = total.abs().amax(1, keepdim=True)
    limits = [largest > (_LARGEST << doublings) for doublings in range(_MOST_DOUBLINGS)]
    doublings = torch.stack(limits).sum(0, dtype=torch.int32)
    more = (words >> _NUM_BITS) & ((1 << doublings) - 1)
    values.copy_(((total + more) >> doublings).clamp(-_LARGEST, _LARGEST))
    exponents.add_(doublings)


def random_words(key: Tensor, first_row: int, num_rows: int, num_columns: int) -> Tensor:
    """Returns random int32 for rows of a matrix from `first_row` on, [num_rows, num_columns]: a
    function of the place in the matrix and the key, 0-dim int32."""
    rows = torch.arange(first_row, first_row + num_rows, dtype=torch.int32, device=key.device)
    columns = torch.arange(num_columns, dtype=torch.int32, device=key.device)
    return splitmix32(splitmix32(key, rows).unsqueeze(1), columns)

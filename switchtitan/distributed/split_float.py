"""24-bit floating point in two tensors: a bf16 value, and the 8 bits of fp32 after it.

The bf16 value is that of 24 bits rounded to nearest, and the rest, int8, is what is missing to it.
"""

import torch
from torch import Tensor

_NUM_BITS = 8
_HALF = 1 << (_NUM_BITS - 1)


def join(high: Tensor, low: Tensor) -> Tensor:
    """Returns the fp32 values of both parts, bf16 and int8 of one shape."""
    bits = (high.view(torch.int16).to(torch.int32) << _NUM_BITS) + low
    return (bits << _NUM_BITS).view(torch.float32)


def split(values: Tensor, words: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rounds fp32 values to 24 bits; returns both parts, bf16 and int8. Of a value that is not
    finite, the first part is nan.

    Args:
        words: random int32 of the same shape. A value that is k / 2^8 of the way to the next one in
            magnitude is rounded up for k of the 2^8 values of their lowest bits: unbiased. By
            default values are rounded to nearest.
    """
    added = _HALF if words is None else words & (2 * _HALF - 1)
    # The sum may overflow the bits of some nan.
    finite = values.where(values.isfinite(), torch.nan)
    kept = (finite.view(torch.int32) + added) >> _NUM_BITS
    high = (kept + _HALF) >> _NUM_BITS
    return high.to(torch.int16).view(torch.bfloat16), (kept - (high << _NUM_BITS)).to(torch.int8)

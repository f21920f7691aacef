"""Rounding of fp32 to bf16, and to 24 bits in two tensors: a bf16 value, and 8 bits after it.

The bf16 value is that of 24 bits rounded to nearest, and the rest, int8, is what is missing to it.
"""

import torch
from torch import Tensor

_NUM_BITS = 8
_HALF = 1 << (_NUM_BITS - 1)


def round_to_bf16(values: Tensor, words: Tensor) -> Tensor:
    """Rounds fp32 values to bf16 stochastically; `words` as for `split`."""
    return _upper_bits(values, 2 * _NUM_BITS, words).to(torch.int16).view(torch.bfloat16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """Returns the fp32 values of both parts, bf16 and int8 of one shape."""
    bits = (high.view(torch.int16).to(torch.int32) << _NUM_BITS) + low
    return (bits << _NUM_BITS).view(torch.float32)


def split(values: Tensor, words: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rounds fp32 values to 24 bits; returns both parts, bf16 and int8. Inf and nan stay so.

    Args:
        words: random int32 of the same shape. A value that is k / 2^n of the way to the next one in
            magnitude is rounded up for k of the 2^n values of the lowest n bits, as many as are
            dropped: unbiased. By default values are rounded to nearest.
    """
    kept = _upper_bits(values, _NUM_BITS, words)
    high = (kept + _HALF) >> _NUM_BITS
    return high.to(torch.int16).view(torch.bfloat16), (kept - (high << _NUM_BITS)).to(torch.int8)


def _upper_bits(values: Tensor, num_dropped: int, words: Tensor | None) -> Tensor:
    """Returns the bits of rounded fp32 values without the lowest ones, int32."""
    added = 1 << (num_dropped - 1) if words is None else words & ((1 << num_dropped) - 1)
    # The sum would overflow the bits of some nan, such as CUDA's 0x7fffffff.
    return (values.where(~values.isnan(), torch.nan).view(torch.int32) + added) >> num_dropped

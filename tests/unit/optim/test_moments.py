"""Moments in 8 bits are torchao's, and a row of scale zero is zero."""

import pytest
import torch
from support.tensors import draw
from torchao.optim.subclass_8bit import OptimState8bit

from switchtitan.optim.moments import Moments, decoded, encode_


def stored(shape, is_signed):
    moments = Moments("mean", is_signed, {"weight": torch.empty(shape)}, in_8_bits=True)
    return moments, moments.stored["weight"]


@pytest.mark.parametrize("is_signed", [True, False])
def test_codes_and_scales_are_those_of_torchao(is_signed):
    values = draw(64, 192)
    values = values if is_signed else values.square()
    moments, ours = stored((64, 192), is_signed)
    encode_(ours, values)
    theirs = OptimState8bit.zeros((64, 192), is_signed, block_size=192)
    theirs.copy_(values)
    codes, scale, *_ = ours
    assert torch.equal(scale.flatten(), theirs.scale)
    expected = theirs.codes if is_signed else theirs.codes.clamp(min=1)
    # Values in the middle of two codes may be rounded otherwise.
    assert (codes != expected).sum() <= 2
    close = codes == theirs.codes
    torch.testing.assert_close(decoded(ours)[close], theirs.dequantize()[close], rtol=1e-6, atol=0)
    assert moments.state.keys() == {"weight.mean.codes", "weight.mean.scale"}


def test_zeros_stay_zeros_and_are_set_by_the_scale():
    moments, ours = stored((64, 128), is_signed=True)
    assert decoded(ours).count_nonzero() == 0
    values = draw(64, 128)
    values[5] = 0
    encode_(ours, values)
    assert decoded(ours)[5].count_nonzero() == 0
    (scale,) = moments.zeros()
    scale[7:9] = 0
    assert decoded(ours)[7:9].count_nonzero() == 0
    assert (decoded(ours)[[6, 9]] - values[[6, 9]]).abs().max() < 0.1

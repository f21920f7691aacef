"""A fingerprint of each tensor shows whether ranks hold the same bits."""

import pytest
import torch

from switchtitan.distributed.replicas import check_replicas, fingerprint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (11,), (3, 8)])
def test_a_fingerprint_depends_on_every_value_and_its_position(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    own = fingerprint(tensor)
    assert own.shape == ()
    assert torch.equal(own, fingerprint(tensor.clone()))
    flat = tensor.view(-1)
    for index in range(len(flat)):
        before = flat[index].clone()
        flat[index] = -before  # one bit
        assert fingerprint(tensor) != own
        flat[index] = before
    for first in range(len(flat)):
        for second in range(first):
            swapped = flat.clone()
            swapped[[first, second]] = flat[[second, first]]
            assert fingerprint(swapped.view(shape)) != own or flat[first] == flat[second]


@pytest.mark.parametrize("width", [7, 8])
def test_a_fingerprint_does_not_depend_on_the_place_in_memory(width: int) -> None:
    values = torch.randn(5, width)
    wider = torch.zeros(6, width + 3)
    wider[1:, 1 : width + 1] = values
    shifted = torch.cat([torch.zeros(1), values.flatten()])[1:].view(5, width)
    for copy in (wider[1:, 1 : width + 1], shifted, values.t().contiguous().t()):
        assert torch.equal(copy, values)
        assert torch.equal(fingerprint(copy), fingerprint(values))


def test_a_single_process_has_nothing_to_compare() -> None:
    check_replicas({"weight": torch.zeros(2, 3)}, torch.device("cpu"))

"""A fingerprint of each tensor shows whether ranks hold the same bits."""

import pytest
import torch

from switchtitan.distributed.replicas import check_replicas, fingerprint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (11,)])
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


def test_a_single_process_has_nothing_to_compare() -> None:
    check_replicas({"weight": torch.zeros(2, 3)}, torch.device("cpu"))

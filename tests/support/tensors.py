"""Random tensors, equal in every call, and the names of tensors that differ."""

import torch


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw64(*shape, seed=0):
    return draw(*shape, seed=seed, dtype=torch.float64)


@torch.no_grad()
def filled(module, first_seed=0):
    """The module in float64, with drawn parameters."""
    for seed, parameter in enumerate(module.double().parameters(), first_seed):
        parameter.copy_(draw64(*parameter.shape, seed=seed))
    return module


def differing(found, expected):
    """The names of tensors that differ in any bit."""
    assert found.keys() == expected.keys()
    return [name for name in found if not torch.equal(found[name], expected[name])]

"""Parts of a run that behave differently on a GPU, one at a time."""

import importlib.util

import pytest
import torch
from support.switchlora_layers import differing_with_host_candidates

from switchtitan.checkpoint.save import copy_to_host
from switchtitan.models.llama.attention import build_mask, load_attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["flex", "flash_attn"])
def test_backends_of_attention_have_the_gradients_of_sdpa(name):
    if name == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    keys = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    keys["generator"] = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(2, 6, 256, 32, **keys)
    key, value = (torch.randn(2, 3, 256, 32, **keys) for _ in range(2))
    ids = torch.zeros(2, 256, dtype=torch.int32, device="cuda")
    gradients = []
    for each in ("sdpa", name):
        attended = load_attention(each)(query, key, value, build_mask(each, ids))
        gradients.append(torch.autograd.grad(attended.float().square().sum(), (query, key, value)))
    # bf16 sums in another order.
    torch.testing.assert_close(*gradients, atol=5e-2, rtol=5e-2)


def test_candidates_that_wait_on_the_host_have_the_same_bits():
    assert differing_with_host_candidates([(7, 6), (6, 13), (23, 17)], "cuda") == []


def test_copies_of_a_gpus_tensors_are_page_locked():
    matrices = torch.arange(4 * 32 * 5461.0, device="cuda").view(4, 32, 5461)
    memory = {}
    for _ in range(2):
        copies = copy_to_host({"last": matrices[3], "host": torch.ones(3)}, memory)
        assert torch.equal(copies["last"], matrices[3].cpu())
        assert copies["last"].is_pinned()
        assert not copies["host"].is_pinned()
        matrices += 1

"""Attention backends agree with plain softmax attention and mask what they document."""

import importlib.util
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from switchtitan.errors import EnvironmentMismatchError
from switchtitan.models.llama.attention import ATTENTION_BACKENDS, check_attention

BATCH, HEADS, KV_HEADS, SEQ, HEAD_DIM = 2, 6, 3, 13, 8


def plain_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Softmax over visible keys. `visible`: [batch, seq, seq]."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return scores.masked_fill(~visible[:, None], -math.inf).softmax(-1) @ value


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(BATCH, HEADS, SEQ, HEAD_DIM, generator=generator)
    key, value = torch.randn(2, BATCH, KV_HEADS, SEQ, HEAD_DIM, generator=generator)
    return query, key, value


@pytest.fixture
def document_ids() -> Tensor:
    ids = torch.zeros(BATCH, SEQ, dtype=torch.int32)
    ids[0, 4:], ids[0, 9:], ids[1, 12:] = 1, 2, 5
    return ids


def test_sdpa_is_causal_softmax_attention_over_the_packed_sequence(
    inputs: tuple[Tensor, Tensor, Tensor], document_ids: Tensor
) -> None:
    backend = ATTENTION_BACKENDS["sdpa"]
    assert backend.build_mask(document_ids) is None
    causal = torch.ones(SEQ, SEQ, dtype=torch.bool).tril().expand(BATCH, SEQ, SEQ)
    expected = plain_attention(*inputs, causal)
    torch.testing.assert_close(backend.load()(*inputs, None), expected, atol=1e-6, rtol=1e-5)


def test_flex_is_softmax_attention_inside_each_document(
    inputs: tuple[Tensor, Tensor, Tensor], document_ids: Tensor
) -> None:
    backend = ATTENTION_BACKENDS["flex"]
    causal = torch.ones(SEQ, SEQ, dtype=torch.bool).tril()
    same_document = document_ids[:, :, None] == document_ids[:, None, :]
    expected = plain_attention(*inputs, causal & same_document)
    with torch.no_grad():
        attended = backend.load()(*inputs, backend.build_mask(document_ids))
    torch.testing.assert_close(attended, expected, atol=1e-6, rtol=1e-5)


def test_flex_uses_the_documents_of_each_batch(
    inputs: tuple[Tensor, Tensor, Tensor], document_ids: Tensor
) -> None:
    """The mask function closes over the ids; compilation must not keep the first batch's ids."""
    backend = ATTENTION_BACKENDS["flex"]
    first = backend.build_mask(document_ids)
    second = backend.build_mask(torch.zeros_like(document_ids))
    with torch.no_grad():
        of_first, of_second = backend.load()(*inputs, first), backend.load()(*inputs, second)
    sdpa = ATTENTION_BACKENDS["sdpa"].load()(*inputs, None)
    torch.testing.assert_close(of_second, sdpa, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(of_first, sdpa, atol=1e-2)


def test_missing_flash_attention_names_the_install_command() -> None:
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash-attn is installed here")
    with pytest.raises(EnvironmentMismatchError, match="pip install flash-attn --no-build"):
        check_attention("flash_attn", 64, "cuda", torch.bfloat16)
    with pytest.raises(EnvironmentMismatchError, match="pip install flash-attn --no-build"):
        ATTENTION_BACKENDS["flash_attn"].load()


def test_flash_attention_gets_positions_before_heads(
    inputs: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake with the documented signature: [batch, seq, heads, head_dim], fewer key heads."""

    def flash_attn_func(
        query: Tensor, key: Tensor, value: Tensor, causal: bool = False, deterministic: bool = True
    ) -> Tensor:
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        visible = (
            torch.ones(SEQ, SEQ, dtype=torch.bool).tril() if causal else torch.ones(SEQ, SEQ).bool()
        )
        by_head = (part.transpose(1, 2) for part in (query, key, value))
        return plain_attention(*by_head, visible.expand(BATCH, SEQ, SEQ)).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
    attend = ATTENTION_BACKENDS["flash_attn"].load()
    expected = ATTENTION_BACKENDS["sdpa"].load()(*inputs, None)
    torch.testing.assert_close(attend(*inputs, None), expected, atol=1e-6, rtol=1e-5)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs, None), expected, atol=1e-6, rtol=1e-5)


def test_flash_attention_refuses_fp32_and_wide_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_attention("flash_attn", 64, "cuda", torch.bfloat16)
    with pytest.raises(EnvironmentMismatchError, match=r"got torch\.float32"):
        check_attention("flash_attn", 64, "cuda", torch.float32)
    with pytest.raises(EnvironmentMismatchError, match="at most 256 features, got 288"):
        check_attention("flash_attn", 288, "cuda", torch.bfloat16)


@pytest.mark.parametrize(("capability", "is_refused"), [((7, 5), True), ((8, 0), False)])
def test_flash_attention_refuses_gpus_before_ampere(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], is_refused: bool
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    if is_refused:
        with pytest.raises(
            EnvironmentMismatchError, match="Ampere GPU or a newer one, got Tesla T4"
        ):
            check_attention("flash_attn", 64, "cuda", torch.bfloat16)
    else:
        check_attention("flash_attn", 64, "cuda", torch.bfloat16)


def test_flex_refuses_heads_too_small_for_its_kernels() -> None:
    with pytest.raises(EnvironmentMismatchError, match="at least 16 features"):
        check_attention("flex", 8, "cuda", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["flex", "flash_attn"])
def test_gpu_backends_have_the_gradients_of_sdpa(name: str) -> None:
    if name == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    generator = torch.Generator("cuda").manual_seed(0)
    options = {
        "device": "cuda",
        "dtype": torch.bfloat16,
        "generator": generator,
        "requires_grad": True,
    }
    query = torch.randn(2, 6, 256, 32, **options)
    key, value = (torch.randn(2, 3, 256, 32, **options) for _ in range(2))
    ids = torch.zeros(2, 256, dtype=torch.int32, device="cuda")
    gradients = {}
    for each in ("sdpa", name):
        backend = ATTENTION_BACKENDS[each]
        attended = backend.load()(query, key, value, backend.build_mask(ids))
        gradients[each] = torch.autograd.grad(attended.float().square().sum(), (query, key, value))
    for actual, expected in zip(gradients[name], gradients["sdpa"], strict=True):
        # bf16 sums in another order.
        torch.testing.assert_close(actual, expected, atol=5e-2, rtol=5e-2)

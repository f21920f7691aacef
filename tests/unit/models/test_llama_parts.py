"""Rotary embeddings, attention, and the section `[model]` of LLaMA's family."""

import cmath
import importlib.util
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from switchtitan.errors import EnvironmentMismatchError
from switchtitan.models.llama.attention import build_mask, check_attention, load_attention
from switchtitan.models.llama.config import LlamaConfig, Qwen2Config
from switchtitan.models.llama.rope import rotary_tables, rotate

CPU = torch.device("cpu")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rotation_equals_multiplication_by_a_complex_unit():
    head_dim, theta = 6, 500.0
    features = draw(1, 5, 1, head_dim)
    config = LlamaConfig(size="9m", head_dim=head_dim, rope_theta=theta)
    turned = rotate(features, *rotary_tables(config, 5, CPU))
    for position in range(5):
        for pair in range(head_dim // 2):
            first, second = features[0, position, 0, [pair, pair + head_dim // 2]].tolist()
            unit = cmath.exp(1j * position * theta ** (-2 * pair / head_dim))
            actual = complex(*turned[0, position, 0, [pair, pair + head_dim // 2]].tolist())
            # fp32 rounding of angles below 5
            assert actual == pytest.approx(complex(first, second) * unit, abs=1e-6)


BATCH, HEADS, KV_HEADS, SEQ, HEAD_DIM = 2, 6, 3, 13, 8
CAUSAL = torch.ones(SEQ, SEQ, dtype=torch.bool).tril().expand(BATCH, SEQ, SEQ)


def plain_attention(query, key, value, visible):
    """Softmax over visible keys. `visible`: [batch, seq, seq]."""
    key, value = (part.repeat_interleave(HEADS // part.shape[1], dim=1) for part in (key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return scores.masked_fill(~visible[:, None], -math.inf).softmax(-1) @ value


@pytest.fixture
def inputs():
    query = draw(BATCH, HEADS, SEQ, HEAD_DIM)
    key, value = draw(2, BATCH, KV_HEADS, SEQ, HEAD_DIM, seed=1)
    return query, key, value


@torch.no_grad()
def test_flex_is_softmax_attention_inside_each_document_of_each_batch(inputs):
    """The mask function closes over the ids; compilation must not keep the first batch's ids."""
    first = torch.zeros(BATCH, SEQ, dtype=torch.int32)
    first[0, 4:], first[0, 9:], first[1, 12:] = 1, 2, 5
    for ids in (first, torch.zeros_like(first)):
        expected = plain_attention(*inputs, CAUSAL & (ids[:, :, None] == ids[:, None, :]))
        attended = load_attention("flex")(*inputs, build_mask("flex", ids))
        torch.testing.assert_close(attended, expected, atol=1e-6, rtol=1e-5)


def test_flash_attention_gets_positions_before_heads(inputs, monkeypatch):
    """A fake with the documented signature: [batch, seq, heads, head_dim], fewer key heads."""

    def flash_attn_func(query, key, value, causal=False, deterministic=True):
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        visible = CAUSAL if causal else torch.ones_like(CAUSAL)
        by_head = (part.transpose(1, 2) for part in (query, key, value))
        return plain_attention(*by_head, visible).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
    attend = load_attention("flash_attn")
    expected = load_attention("sdpa")(*inputs, None)
    torch.testing.assert_close(attend(*inputs, None), expected, atol=1e-6, rtol=1e-5)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs, None), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "fragment"),
    [
        ("flash_attn", "cpu", torch.bfloat16, "CUDA"),
        ("flash_attn", "cuda", torch.float32, "torch.float32"),
        ("flex", "cpu", torch.bfloat16, "CPU"),
    ],
)
def test_attention_that_cannot_train_here_is_refused(name, device, dtype, fragment):
    with pytest.raises(EnvironmentMismatchError, match=f"attention = '{name}'.*{fragment}"):
        check_attention(name, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flex", "flash_attn"])
def test_gpu_backends_have_the_gradients_of_sdpa(name):
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


def test_overrides_replace_values_of_the_table_and_key_heads_follow_heads():
    config = LlamaConfig(size="60m", num_layers=3, num_kv_heads=2)
    assert config.sizes == (512, 1376, 3, 8)
    assert config.kv_heads == 2
    assert LlamaConfig(size="60m", num_heads=16).kv_heads == 16


LLAMA3 = {
    "rope_type": "llama3",
    "rope_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_positions": 64,
}


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        ({"num_heads": 3}, ("hidden_size = 128", "num_heads = 3")),
        ({"hidden_size": 36, "num_heads": 4}, ("hidden_size = 36", "num_heads = 4")),
        ({"num_kv_heads": 3}, ("num_heads = 4", "num_kv_heads = 3")),
        ({"size": None}, ("size", "missing")),
        ({"size": None, "hidden_size": 8, "num_heads": 2}, ("intermediate_size", "num_layers")),
        ({"head_dim": 1 << 13}, ("head_dim", "4096")),
        ({"rope_factor": 2.0}, ("rope_factor = 2.0", "default")),
        ({"rope_type": "linear"}, ("linear", "rope_factor")),
        ({**LLAMA3, "rope_original_positions": None}, ("llama3", "rope_original_positions")),
        ({**LLAMA3, "rope_high_freq_factor": 0.5}, ("0.5", "rope_low_freq_factor = 1")),
    ],
)
def test_dimensions_that_do_not_fit_together_are_refused(overrides, fragments):
    with pytest.raises(ValidationError) as caught:
        LlamaConfig(**{"size": "9m", **overrides})
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_equal_models_have_equal_architectures_however_their_keys_were_given():
    shapes = {"hidden_size": 128, "intermediate_size": 352, "num_layers": 4, "num_heads": 4}
    others = {"head_dim": 32, "attention": "flex", "init_std": 0.1, "max_positions": 99}
    by_size = LlamaConfig(size="9m", vocab_size=53).architecture()
    assert LlamaConfig(**shapes, **others, vocab_size=53).architecture() == by_size
    for changes in ({"tied_head": True}, {"norm_eps": 1e-5}, LLAMA3):
        assert LlamaConfig(size="9m", vocab_size=53, **changes).architecture() != by_size
    assert Qwen2Config(size="9m", vocab_size=53).architecture() != by_size

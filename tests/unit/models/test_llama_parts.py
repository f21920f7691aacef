"""Rotary embeddings, attention, and the section `[model]` of LLaMA's family."""

import pytest
import torch
from pydantic import ValidationError
from support.checkpoints import refused
from support.small_llama import LLAMA3
from support.tensors import draw

from switchtitan.errors import EnvironmentMismatchError
from switchtitan.models.llama.attention import check_attention
from switchtitan.models.llama.config import LlamaConfig, Qwen2Config
from switchtitan.models.llama.model import rotary_tables, rotate

CPU = torch.device("cpu")


def test_rotation_equals_multiplication_by_a_complex_unit():
    head_dim, theta = 6, 500.0
    features = draw(1, 5, 1, head_dim)
    config = LlamaConfig(size="9m", head_dim=head_dim, rope_theta=theta)
    turned = rotate(features, *rotary_tables(config, 5, CPU))
    angles = torch.arange(5)[:, None] * theta ** (-2 * torch.arange(head_dim // 2) / head_dim)
    given, found = (torch.complex(*part.squeeze().chunk(2, -1)) for part in (features, turned))
    # fp32 rounding of angles below 5
    torch.testing.assert_close(found, given * torch.exp(1j * angles), rtol=0, atol=1e-6)


def test_attention_that_computes_in_half_precision_alone_is_refused_in_fp32():
    with pytest.raises(EnvironmentMismatchError, match=r"attention = 'flash_attn'.*float32"):
        check_attention("flash_attn", "cuda", torch.float32)


def test_overrides_replace_values_of_the_table_and_key_heads_follow_heads():
    config = LlamaConfig(size="60m", num_layers=3, num_kv_heads=2)
    assert config.sizes == (512, 1376, 3, 8)
    assert config.kv_heads == 2
    assert LlamaConfig(size="60m", num_heads=16).kv_heads == 16


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
    with refused(*fragments, error=ValidationError):
        LlamaConfig(**{"size": "9m", **overrides})


def test_equal_models_have_equal_architectures_however_their_keys_were_given():
    shapes = {"hidden_size": 128, "intermediate_size": 352, "num_layers": 4, "num_heads": 4}
    others = {"head_dim": 32, "attention": "flex", "init_std": 0.1, "max_positions": 99}
    by_size = LlamaConfig(size="9m", vocab_size=53).architecture()
    assert LlamaConfig(**shapes, **others, vocab_size=53).architecture() == by_size
    for changes in ({"tied_head": True}, {"norm_eps": 1e-5}, LLAMA3):
        assert LlamaConfig(size="9m", vocab_size=53, **changes).architecture() != by_size
    assert Qwen2Config(size="9m", vocab_size=53).architecture() != by_size

"""The table of sizes, its overrides and the checks between them."""

from math import prod

import pytest
import torch
from pydantic import ValidationError

from switchtitan.errors import ConfigError, EnvironmentMismatchError
from switchtitan.models import MODELS
from switchtitan.models.cola import ColaConfig
from switchtitan.models.llama.config import SIZES, LlamaConfig, LlamaFamilyConfig
from switchtitan.models.qwen2.config import Qwen2Config

LLAMA3 = {
    "rope_type": "llama3",
    "rope_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_positions": 64,
}


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_the_parameters_of_the_formula(size: str) -> None:
    config = LlamaConfig(size=size)
    hidden, intermediate, num_layers, _ = SIZES[size]
    expected = 2 * 32100 * hidden + hidden
    expected += num_layers * (4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden)
    with torch.device("meta"):
        model = MODELS.build(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert not list(model.buffers())


@pytest.mark.parametrize(("size", "millions"), [("350m", 368.2), ("1b", 1339.5)])
def test_published_sizes_have_the_published_number_of_parameters(
    size: str, millions: float
) -> None:
    shapes = LlamaConfig(size=size).dimensions().parameter_shapes().values()
    assert sum(map(prod, shapes)) / 1e6 == pytest.approx(millions, abs=0.05)


SHAPES = {
    "size": "9m",
    "hidden_size": 36,
    "num_heads": 6,
    "num_kv_heads": 3,
    "intermediate_size": 29,
    "num_layers": 3,
    "vocab_size": 53,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SHAPES),
        LlamaConfig(**SHAPES, tied_head=True, head_dim=4),
        Qwen2Config(**SHAPES),
        Qwen2Config(**SHAPES, tied_head=True),
        ColaConfig(**SHAPES, rank=5),
        ColaConfig(**SHAPES, rank=5, tied_head=True),
    ],
)
def test_shapes_equal_those_of_the_built_model(config: LlamaFamilyConfig) -> None:
    with torch.device("meta"):
        model = MODELS.build(config)
    built = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    linear = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert config.dimensions().parameter_shapes() == built
    assert config.linear_shapes() == linear
    assert list(config.linear_shapes()) == list(linear)
    assert ("lm_head" in linear) != config.tied_head
    assert any(name.endswith(".bias") for name in built) == (config.name == "qwen2")


def test_overrides_replace_values_of_the_table() -> None:
    dims = LlamaConfig(size="60m", num_layers=3, num_kv_heads=2).dimensions()
    assert (dims.hidden_size, dims.intermediate_size, dims.num_heads) == (512, 1376, 8)
    assert (dims.num_layers, dims.num_kv_heads) == (3, 2)


def test_key_and_value_heads_follow_overridden_heads() -> None:
    assert LlamaConfig(size="60m", num_heads=16).dimensions().num_kv_heads == 16


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"num_heads": 3}, ["hidden_size = 128", "num_heads = 3", "divisors"]),
        ({"hidden_size": 36, "num_heads": 4}, ["= 9 is odd", "2 \\* num_heads"]),
        ({"num_kv_heads": 3}, ["num_heads = 4", "num_kv_heads = 3", "divisors"]),
        ({"vocab_size": 0}, ["vocab_size"]),
        ({"num_layers": -1}, ["num_layers"]),
        ({"norm_eps": 0.0}, ["norm_eps"]),
        ({"hiden_size": 64}, ["hiden_size"]),
        ({"attention": "eager"}, ["attention", "sdpa"]),
        ({"size": "8m"}, ["size", "9m"]),
        ({"size": None}, ["size is missing; set one of 9m, .*hidden_size.*num_heads"]),
        ({"size": None, "hidden_size": 8, "num_heads": 2}, ["set intermediate_size, num_layers"]),
        ({"head_dim": 5}, ["head_dim", "multiple of 2"]),
        ({"vocab_size": 1 << 62}, ["vocab_size", "16777216"]),
        ({"head_dim": 1 << 24}, [r"num_heads \* head_dim = 67108864: expected at most 16777216"]),
        ({"rope_type": "yarn"}, ["rope_type", "'llama3'"]),
        ({"rope_factor": 2.0}, ["rope_factor = 2.0 has no effect with rope_type = 'default'"]),
        ({"rope_type": "linear"}, ["rope_type = 'linear' needs rope_factor"]),
        ({**LLAMA3, "rope_original_positions": None}, ["needs rope_original_positions"]),
        ({**LLAMA3, "rope_high_freq_factor": 0.5}, ["expected more than rope_low_freq_factor = 1"]),
    ],
)
def test_invalid_dimensions_are_refused_by_name(overrides: dict, words: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        LlamaConfig(**{"size": "9m", **overrides})
    for word in words:
        caught.match(word)


def test_flash_attention_on_a_cpu_is_an_error_with_a_hint() -> None:
    config = LlamaConfig(size="9m", attention="flash_attn")
    with pytest.raises(EnvironmentMismatchError, match=r"attention = 'flash_attn'.*CUDA.*sdpa"):
        config.check_device("cpu")


def test_flex_attention_cannot_train_on_a_cpu() -> None:
    with pytest.raises(EnvironmentMismatchError, match=r"attention = 'flex'.*backward.*CPU.*sdpa"):
        LlamaConfig(size="9m", attention="flex").check_device("cpu")


def test_sdpa_trains_everywhere() -> None:
    for device_type in ("cpu", "cuda"):
        LlamaConfig(size="9m").check_device(device_type, torch.float32)


def test_registry_suggests_the_nearest_model() -> None:
    with pytest.raises(ConfigError, match="did you mean 'llama'"):
        MODELS["lama"]


def test_a_number_of_layers_whose_names_would_fill_memory_is_refused():
    with pytest.raises(ValidationError, match="less than or equal to 10000"):
        LlamaConfig(size="9m", num_layers=1 << 31)


def test_equal_models_have_equal_architectures_however_their_keys_were_given() -> None:
    by_size = LlamaConfig(size="9m", vocab_size=53)
    by_keys = LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_layers=4,
        num_heads=4,
        head_dim=32,
        vocab_size=53,
        attention="flex",
        init_std=0.1,
        max_positions=99,
    )
    assert by_size.architecture() == by_keys.architecture()
    for changes in ({"tied_head": True}, {"norm_eps": 1e-5}, LLAMA3):
        other = LlamaConfig(size="9m", vocab_size=53, **changes)
        assert other.architecture() != by_size.architecture()
    assert Qwen2Config(size="9m", vocab_size=53).architecture() != by_size.architecture()


@pytest.mark.parametrize("tied_head", [False, True])
def test_a_tied_head_costs_the_operations_of_an_untied_one(tied_head: bool) -> None:
    dims = LlamaConfig(**{**SHAPES, "tied_head": tied_head, "head_dim": 4}).dimensions()
    blocks = 3 * (36 * (24 + 12 + 12 + 24) + 3 * 36 * 29)
    assert dims.num_flops_per_token(7) == 6 * (blocks + 53 * 36) + 12 * 3 * 24 * 7


@pytest.mark.parametrize("model_type", [[1, 2], {"": {}}, None, 3])
def test_a_model_type_that_is_no_string_differs(model_type: object) -> None:
    found = LlamaConfig(size="9m").huggingface_config(64) | {"model_type": model_type}
    (message,) = LlamaConfig(size="9m").check_huggingface_config(found)
    assert message.startswith(f"model_type = {model_type!r}, ")

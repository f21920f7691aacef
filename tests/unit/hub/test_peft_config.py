"""Adapters have the scale that PEFT gives them; those that compute otherwise are refused."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers import LlamaConfig as TheirConfig

from switchtitan.errors import CheckpointError
from switchtitan.hub.peft_config import ADAPTER_CONFIG_NAME, AdapterConfig
from switchtitan.hub.peft_folder import read_adapted

TOKENS = torch.arange(2 * 13).reshape(2, 13) * 7 % 53
TOLERANCE = 1e-5
"""On logits of about 0.1; a merged weight and separate factors are rounded differently."""
WRONG = 1e-3
"""What a wrong scale changes at least."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = TheirConfig(
        vocab_size=53,
        hidden_size=36,
        intermediate_size=29,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    folder = tmp_path_factory.mktemp("adapters") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_adapter(
    base: Path, folder: Path, start: Callable[[Any], object] = lambda model: None, **keys: Any
) -> Path:
    """Saves an adapter whose factors are random."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], **keys)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    start(model)
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if "lora_" in name:
                factor.add_(0.1 * torch.randn_like(factor))
    model.save_pretrained(folder)
    return folder


def logits_of_peft(base: Path, folder: Path) -> Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)(
            TOKENS
        ).logits


def merged_logits(base: Path, folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_state_dict(read_adapted(folder))
    with torch.no_grad():
        return model(TOKENS).logits


def change_config(folder: Path, changes: Mapping[str, object]) -> None:
    file = folder / ADAPTER_CONFIG_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "name",
    [
        "q_proj",
        "self_attn.q_proj",
        "model.layers.0.self_attn.q_proj",
        "^model.layers.0.self_attn.q_proj",
        r"model\.layers\.\d+\.self_attn\.q_proj",
        "(q|down)_proj",
        r".*\.[01]\.mlp.*",
        # Without an effect: PEFT matches names up to their end, from their start or a dot.
        "^q_proj",
        "roj",
        "self_attn",
    ],
)
@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern"])
def test_a_pattern_gives_the_logits_that_peft_computes(
    base: Path, tmp_path: Path, key: str, name: str
) -> None:
    folder = save_adapter(base, tmp_path / "adapter", **{key: {name: 2}})
    expected = logits_of_peft(base, folder)
    torch.testing.assert_close(merged_logits(base, folder), expected, rtol=0, atol=TOLERANCE)


def test_the_first_pattern_that_matches_counts(base: Path, tmp_path: Path) -> None:
    patterns = {r".*\.1\..*": 48, "q_proj": 24, "model.layers.1.self_attn.q_proj": 96}
    folder = save_adapter(base, tmp_path / "adapter", alpha_pattern=patterns)
    expected = logits_of_peft(base, folder)
    torch.testing.assert_close(merged_logits(base, folder), expected, rtol=0, atol=TOLERANCE)
    # The control: each of them matters.
    for left_out in patterns.keys() - {"model.layers.1.self_attn.q_proj"}:
        others = {name: alpha for name, alpha in patterns.items() if name != left_out}
        change_config(folder, {"alpha_pattern": others})
        assert (merged_logits(base, folder) - expected).abs().max() > WRONG


@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern"])
@pytest.mark.parametrize("name", ["q_proj(", "[", "*", "a{2,1}"])
def test_a_key_that_is_no_regular_expression_is_refused(
    base: Path, tmp_path: Path, key: str, name: str
) -> None:
    folder = save_adapter(base, tmp_path / "adapter")
    change_config(folder, {key: {name: 3}})
    with pytest.raises(CheckpointError, match=rf"{key} = .*no regular expression .*fix it"):
        AdapterConfig(folder)


@pytest.mark.parametrize("alpha", ["5", None, True, 10**400, float("inf"), float("nan"), [1]])
def test_an_alpha_that_is_no_number_is_refused(base: Path, tmp_path: Path, alpha: object) -> None:
    folder = save_adapter(base, tmp_path / "adapter")
    change_config(folder, {"lora_alpha": alpha})
    with pytest.raises(CheckpointError, match=r"lora_alpha = .*: expected a number"):
        AdapterConfig(folder).scale_of("model.layers.0.self_attn.q_proj", 4)


@pytest.mark.parametrize("rank", [0, 3, 5])
def test_factors_of_another_rank_are_refused(base: Path, tmp_path: Path, rank: int) -> None:
    folder = save_adapter(base, tmp_path / "adapter")
    layer = "model.layers.0.self_attn.q_proj"
    assert AdapterConfig(folder).scale_of(layer, 4) == 6 / 4
    with pytest.raises(CheckpointError, match=rf"r = 4 for {layer}: its factors have rank {rank}"):
        AdapterConfig(folder).scale_of(layer, rank)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica", "eva"])
def test_initializations_that_keep_the_base_are_merged(
    base: Path, tmp_path: Path, init: Any
) -> None:
    keys: dict[str, Any] = {"init_lora_weights": init}
    if init == "eva":
        keys |= {"eva_config": EvaConfig(rho=2.0)}
    batches = [{"input_ids": row[None]} for row in TOKENS.repeat(8, 1)]

    def start(model: Any) -> None:
        if init == "eva":
            initialize_lora_eva_weights(model, batches, show_progress_bar=False)

    folder = save_adapter(base, tmp_path / "adapter", start, **keys)
    expected = logits_of_peft(base, folder)
    torch.testing.assert_close(merged_logits(base, folder), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("keys", "plain"),
    [
        ({"init_lora_weights": "olora"}, True),
        ({"init_lora_weights": "pissa"}, True),
        ({"init_lora_weights": "pissa_niter_4"}, True),
        ({"alora_invocation_tokens": [21, 28]}, None),
    ],
)
def test_an_adapter_that_changes_the_base_or_acts_on_some_tokens_is_refused(
    base: Path, tmp_path: Path, keys: dict[str, Any], plain: object
) -> None:
    folder = save_adapter(base, tmp_path / "adapter", **keys)
    (key,) = keys
    with pytest.raises(CheckpointError, match=rf"{key} = .*is not supported.*merge_and_unload"):
        merged_logits(base, folder)
    # The control: merged as a plain adapter, it computes other logits.
    trained = logits_of_peft(base, folder)
    change_config(folder, {key: plain})
    assert (merged_logits(base, folder) - trained).abs().max() > WRONG


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("bias", "all"),
        ("use_dora", True),
        ("use_rslora", "yes"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("layer_replication", [[0, 1]]),
        ("trainable_token_indices", [3]),
        ("use_bdlora", {"nblocks": 2}),
        ("a_key_of_a_later_version", 0.5),
        ("alpha_pattern", [1]),
    ],
)
def test_other_kinds_are_refused_by_key(
    base: Path, tmp_path: Path, key: str, value: object
) -> None:
    folder = save_adapter(base, tmp_path / "adapter")
    AdapterConfig(folder)
    change_config(folder, {key: value})
    with pytest.raises(CheckpointError, match=rf"{ADAPTER_CONFIG_NAME}: {key} = "):
        AdapterConfig(folder)


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_key_without_a_value_is_accepted(
    base: Path, tmp_path: Path, value: object
) -> None:
    folder = save_adapter(base, tmp_path / "adapter")
    change_config(folder, {"a_key_of_a_later_version": value})
    AdapterConfig(folder)

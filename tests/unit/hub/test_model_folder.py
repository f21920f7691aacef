"""A folder that transformers saved is the same model here, or is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.folders import KINDS, draw_tokens, logits_of_transformers, save_random_model
from support.held_weights import HeldWeights
from torch import Tensor
from transformers import AutoModelForCausalLM

from switchtitan.contracts import ModelConfig
from switchtitan.errors import CheckpointError, ConfigError
from switchtitan.hub.export_folder import export_dense
from switchtitan.hub.huggingface import parameter_shapes
from switchtitan.hub.initial_weights import read_initial_weights
from switchtitan.hub.model_folder import read_model_folder
from switchtitan.models import MODELS

TOKENS = draw_tokens(2, 200)
TOLERANCE = 1e-5
"""On logits of about 5; sums of fp32 may run in another order."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("folders")
    return {kind: save_random_model(kind, home / kind, "100KB") for kind in KINDS}


def read_section(folder: Path, **changes: Any) -> ModelConfig:
    return MODELS.restore({**read_model_folder(folder), **changes})


def logits_of(config: ModelConfig, weights: dict[str, Tensor]) -> Tensor:
    model = MODELS.build(config)
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(TOKENS, torch.zeros(TOKENS.shape, dtype=torch.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_transformers(folders: dict[str, Path], kind: str) -> None:
    config = read_section(folders[kind])
    weights = read_initial_weights(folders[kind], config).tensors
    expected = logits_of_transformers(folders[kind], TOKENS)
    torch.testing.assert_close(logits_of(config, weights), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"rope_theta": 10000.0}),
        ("llama", {"norm_eps": 1e-6}),
        (
            "llama3, tied",
            {
                "rope_type": "default",
                "rope_factor": None,
                "rope_low_freq_factor": None,
                "rope_high_freq_factor": None,
                "rope_original_positions": None,
            },
        ),
        ("llama3, tied", {"rope_original_positions": 128}),
        ("llama, linear", {"rope_factor": 2.0}),
        ("qwen2", {"norm_eps": 1e-4}),
    ],
)
def test_a_key_that_is_ignored_changes_the_logits(
    folders: dict[str, Path], kind: str, changes: dict[str, Any]
) -> None:
    """The control of the test above, and each is refused next to its config.json."""
    weights = read_initial_weights(folders[kind], read_section(folders[kind])).tensors
    other = read_section(folders[kind], **changes)
    expected = logits_of_transformers(folders[kind], TOKENS)
    assert (logits_of(other, weights) - expected).abs().max() > 100 * TOLERANCE
    with pytest.raises(CheckpointError, match=r"config\.json describes another model: "):
        read_initial_weights(folders[kind], other)


def test_biases_change_the_logits(folders: dict[str, Path]) -> None:
    config = read_section(folders["qwen2"])
    weights = read_initial_weights(folders["qwen2"], config).tensors
    biases = [name for name in weights if name.endswith(".bias")]
    assert len(biases) == 2 * 3
    without = {**weights, **{name: torch.zeros_like(weights[name]) for name in biases}}
    assert (logits_of(config, without) - logits_of(config, weights)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_has_the_bits_of_the_folder_and_transformers_logits(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    config = read_section(folders[kind])
    weights = read_initial_weights(folders[kind], config).tensors
    export_dense(HeldWeights(weights), config, tmp_path / "out", torch.float32, seq_len=16)
    given = {
        name: tensor
        for file in folders[kind].glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == given.keys()
    assert all(torch.equal(exported[name], value) for name, value in given.items())
    expected = logits_of_transformers(folders[kind], TOKENS)
    assert torch.equal(logits_of_transformers(tmp_path / "out", TOKENS), expected)
    # A model that was read from the export is the same one.
    assert read_model_folder(tmp_path / "out") == read_model_folder(folders[kind])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert theirs.tie_word_embeddings == ("tied" in kind)
    assert theirs.max_position_embeddings == 256


def test_version_4_of_transformers_writes_other_rotary_keys(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    def as_version_4(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope

    for kind in ("llama3, tied", "llama, linear"):
        folder = changed_copy(folders[kind], tmp_path / kind, as_version_4)
        assert read_model_folder(folder) == read_model_folder(folders[kind])
    keys = read_model_folder(changed_copy(folders["llama"], tmp_path / "old", as_older))
    assert (keys["rope_theta"], keys["rope_type"], keys["num_kv_heads"]) == (10000.0, "default", 9)


def as_older(config: dict[str, Any]) -> None:
    for key in ("rope_parameters", "num_key_value_heads", "head_dim", "tie_word_embeddings"):
        config.pop(key, None)
    config["rope_scaling"] = None


def changed_copy(folder: Path, copy: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A folder with only a changed config.json."""
    copy.mkdir()
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("llama", {"model_type": "mixtral"}, r"model_type = 'mixtral': .*'llama', 'mistral', 'qw"),
        ("llama", {"model_type": None}, r"model_type = None: expected one of"),
        ("llama", {"model_type": ["llama"]}, r"model_type = \['llama'\]: expected one of"),
        ("llama", {"attention_bias": True}, r"attention_bias = True: expected false"),
        ("llama", {"mlp_bias": True}, r"mlp_bias = True: expected false"),
        ("llama", {"hidden_act": "gelu"}, r"hidden_act = 'gelu': expected 'silu'"),
        ("llama", {"quantization_config": {"bits": 4}}, r"quantization_config: .*not quantized"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            r"rope_type = 'yarn': expected one of 'default', 'linear', 'llama3'",
        ),
        ("llama", {"rope_scaling": [1]}, r"rope_scaling = \[1\]: expected an object"),
        ("llama", {"rope_scaling": {"type": "linear"}}, r"factor is missing: expected a number"),
        ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor: expected 1"),
        ("llama", {"hidden_size": None}, r"hidden_size is missing: expected an integer above 0"),
        ("llama", {"hidden_size": "54"}, r"hidden_size = '54': expected an integer above 0"),
        ("llama", {"num_hidden_layers": True}, r"num_hidden_layers = True: expected an integer"),
        ("llama", {"rms_norm_eps": -1}, r"rms_norm_eps = -1: expected a number above 0"),
        ("llama", {"tie_word_embeddings": 1}, r"tie_word_embeddings = 1: expected true or false"),
        ("llama", {"num_key_value_heads": 2}, r"num_kv_heads = 2; choose"),
        ("llama", {"head_dim": 7}, r"head_dim.*multiple of 2"),
        ("llama", {"num_hidden_layers": 10**9}, r"num_layers.*10000"),
        ("mistral", {"sliding_window": 128}, r"sliding_window = 128: expected null"),
        ("mistral", {"sliding_window": ...}, r"sliding_window = 4096: expected null"),
        ("mistral", {"num_key_value_heads": ...}, r"num_key_value_heads is missing"),
        ("qwen2", {"use_sliding_window": True}, r"use_sliding_window = True: expected false"),
        (
            "qwen2",
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types = .*: expected 'full_attention' for all layers",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    folders: dict[str, Path], tmp_path: Path, kind: str, changes: dict[str, Any], words: str
) -> None:
    def change(config: dict[str, Any]) -> None:
        for key, value in changes.items():
            if value is ...:
                del config[key]
            else:
                config[key] = value

    with pytest.raises(ConfigError, match=rf"config\.json: .*{words}"):
        read_model_folder(changed_copy(folders[kind], tmp_path / "bad", change))


def test_all_problems_are_named_together(folders: dict[str, Path], tmp_path: Path) -> None:
    changes = {"hidden_act": "gelu", "vocab_size": 0, "attention_bias": True}
    folder = changed_copy(folders["llama"], tmp_path / "bad", lambda config: config.update(changes))
    with pytest.raises(ConfigError) as caught:
        read_model_folder(folder)
    for key in changes:
        caught.match(key)


@pytest.mark.parametrize("content", ["not json", "[]", "3", "[" * 100_000])
def test_a_damaged_config_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json is corrupted"):
        read_model_folder(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file .*config\.json; expected a folder in Hugging"):
        read_model_folder(tmp_path)


def test_a_repeated_tied_head_is_dropped_and_another_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    config = read_section(folders["qwen2, tied"])
    weights = read_initial_weights(folders["qwen2, tied"], config).tensors
    assert "lm_head.weight" not in weights
    embedding = weights["model.embed_tokens.weight"]
    file = tmp_path / "model.safetensors"
    save_file({**weights, "lm_head.weight": embedding.clone()}, file)
    assert read_initial_weights(tmp_path, config).tensors.keys() == weights.keys()
    # Other programs may store only the head's name.
    only_head = {name: value for name, value in weights.items() if value is not embedding}
    save_file({**only_head, "lm_head.weight": embedding.clone()}, file)
    read = read_initial_weights(tmp_path, config).tensors
    assert torch.equal(read["model.embed_tokens.weight"], embedding)
    save_file({**weights, "lm_head.weight": embedding + 1}, file)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and model\.embed_tokens\.weight d"):
        read_initial_weights(tmp_path, config)


def test_stored_rotary_frequencies_are_left_out(folders: dict[str, Path], tmp_path: Path) -> None:
    config = read_section(folders["llama"])
    weights = read_initial_weights(folders["llama"], config).tensors
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    save_file({**weights, **frequencies}, tmp_path / "model.safetensors")
    assert read_initial_weights(tmp_path, config).tensors.keys() == parameter_shapes(config).keys()


def test_a_folder_of_another_family_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"model_type = 'qwen2', \[model\] name = 'llama'"):
        read_initial_weights(folders["qwen2"], read_section(folders["llama"]))

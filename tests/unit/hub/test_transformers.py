"""A folder of transformers is the same model here and an export is the same model there; what is
not supported is refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import refused
from support.folders import KINDS, change_json, read_weights, save_random_model
from support.tensors import differing

from switchtitan.errors import CheckpointError, ConfigError
from switchtitan.hub.export_folder import export_dense
from switchtitan.hub.huggingface import read_dense
from switchtitan.hub.initial_weights import read_model_folder
from switchtitan.models import MODELS

TOKENS = torch.randint(0, 1000, (2, 200), generator=torch.Generator().manual_seed(5))
TOLERANCE = 1e-5
"""On logits of about 5; sums of fp32 may run in another order."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("folders")
    return {kind: save_random_model(kind, home / kind, "250KB") for kind in KINDS}


@pytest.fixture
def llama(folders):
    """The section and the weights of a LLaMA."""
    return read_folder(folders["llama"])


def read_section(folder, **changes):
    return MODELS.restore({**read_model_folder(folder), **changes})


def read_folder(folder):
    """Returns the model's section and its weights."""
    config = read_section(folder)
    return config, read_weights(folder, config)


def logits_of(config, weights):
    model = MODELS.build(config)
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(TOKENS, torch.zeros_like(TOKENS, dtype=torch.int32))


def logits_of_transformers(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def export(config, weights, folder, dtype=torch.float32, **keys):
    export_dense(weights.__getitem__, config, folder, dtype, **keys)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_transformers(folders, kind):
    config, weights = read_folder(folders[kind])
    expected = logits_of_transformers(folders[kind])
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits_of(config, weights), expected, atol=TOLERANCE, rtol=0)


def tensors_in(folder):
    """The tensors of a folder that has several shards of at most 250 kB."""
    shards = [load_file(file) for file in folder.glob("model-*-of-*.safetensors")]
    assert len(shards) > 1
    assert all(sum(tensor.nbytes for tensor in shard.values()) <= 250_000 for shard in shards)
    return {name: tensor for shard in shards for name, tensor in shard.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_has_the_bits_of_the_folder_and_is_the_same_model(folders, tmp_path, kind):
    model = read_folder(folders[kind])
    export(*model, tmp_path / "out", seq_len=16, max_shard_bytes=250_000)
    given, exported = tensors_in(folders[kind]), tensors_in(tmp_path / "out")
    assert differing(exported, given) == []
    expected = logits_of_transformers(folders[kind])
    assert torch.equal(logits_of_transformers(tmp_path / "out"), expected)
    assert read_model_folder(tmp_path / "out") == read_model_folder(folders[kind])
    theirs = json.loads((tmp_path / "out" / "config.json").read_text())
    assert theirs["tie_word_embeddings"] == ("tied" in kind)
    assert theirs["max_position_embeddings"] == 256


def test_weights_are_rounded_once(llama, tmp_path):
    export(*llama, tmp_path / "bf16", dtype=torch.bfloat16)
    back = read_dense(tmp_path / "bf16")
    assert all(torch.equal(back[name], value.bfloat16()) for name, value in llama[1].items())
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_missing_unexpected_and_misshapen_weights_are_named(llama, tmp_path):
    config, weights = llama
    del weights["lm_head.weight"]
    weights["model.layers.0.self_attn.q_proj.lora_a"] = torch.zeros(2, 54)
    weights["model.norm.weight"] = torch.zeros(53)
    save_file(weights, tmp_path / "weights.safetensors")
    parts = ("missing: lm_head.weight", "unexpected: model.layers.0.self_attn.q_proj.lora_a")
    with refused(*parts, "model.norm.weight [53] instead of [54]"):
        read_weights(tmp_path / "weights.safetensors", config)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("llama", {"rope_theta": 10000.0}, r"rope_theta = 700\.0, \[model\] has 10000"),
        ("llama", {"num_heads": 3, "num_kv_heads": 1}, "num_heads = 9"),
        ("llama3, tied", {"rope_original_positions": 128}, "rope_original_positions"),
        ("qwen2", {"name": "llama"}, "name = 'qwen2', .* 'llama'"),
    ],
)
def test_weights_of_another_model_are_refused(folders, kind, changes, words):
    with pytest.raises(CheckpointError, match=rf"config\.json describes another model: .*{words}"):
        read_weights(folders[kind], read_section(folders[kind], **changes))


def changed_copy(folder, copy, changes):
    """A folder with only a changed config.json."""
    copy.mkdir()
    shutil.copyfile(folder / "config.json", copy / "config.json")
    change_json(copy / "config.json", changes)
    return copy


def test_version_4_of_transformers_writes_other_rotary_keys(folders, tmp_path):
    for kind in ("llama3, tied", "llama, linear"):
        rope = json.loads((folders[kind] / "config.json").read_text())["rope_parameters"]
        theta = rope.pop("rope_theta")
        changes = {"rope_parameters": ..., "rope_theta": theta, "rope_scaling": rope}
        folder = changed_copy(folders[kind], tmp_path / kind, changes)
        assert read_model_folder(folder) == read_model_folder(folders[kind])
    removed = ("rope_parameters", "num_key_value_heads", "head_dim", "tie_word_embeddings")
    changes = {"rope_scaling": None, **dict.fromkeys(removed, ...)}
    config = read_section(changed_copy(folders["llama"], tmp_path / "old", changes))
    assert (config.rope_theta, config.rope_type, config.kv_heads) == (10000.0, "default", 9)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("llama", {"model_type": "mixtral"}, "model_type = 'mixtral'"),
        ("llama", {"attention_bias": True}, "attention_bias = True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 'rope_type = "yarn"'),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
        ("llama", {"head_dim": 7}, "head_dim"),
        ("mistral", {"head_dim": ...}, "hidden_size = 54, num_heads = 12"),
        ("mistral", {"sliding_window": ...}, "sliding_window = 4096"),
        ("mistral", {"num_key_value_heads": ...}, "num_key_value_heads is missing"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("llama", {"vocab_size": 0, "hidden_act": "x"}, "hidden_act.*vocab_size"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(folders, tmp_path, kind, changes, words):
    with pytest.raises(ConfigError, match=rf"config\.json: .*({words})"):
        read_model_folder(changed_copy(folders[kind], tmp_path / "bad", changes))


def test_what_repeats_or_is_computed_is_dropped_and_another_head_is_refused(folders, tmp_path):
    config, weights = read_folder(folders["qwen2, tied"])
    assert "lm_head.weight" not in weights
    embedding = weights["model.embed_tokens.weight"]
    file = tmp_path / "model.safetensors"
    save_file({**weights, "lm_head.weight": embedding.clone()}, file)
    assert read_weights(tmp_path, config).keys() == weights.keys()
    # Old versions of transformers store rotary frequencies too.
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    save_file({**weights, **frequencies}, file)
    assert read_weights(tmp_path, config).keys() == weights.keys()
    # Other programs may store only the head's name.
    only_head = {name: value for name, value in weights.items() if value is not embedding}
    save_file({**only_head, "lm_head.weight": embedding.clone()}, file)
    read = read_weights(tmp_path, config)
    assert torch.equal(read["model.embed_tokens.weight"], embedding)
    save_file({**weights, "lm_head.weight": embedding + 1}, file)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and model\.embed_tokens\.weight"):
        read_weights(tmp_path, config)


def test_damaged_and_missing_weights_are_named(llama, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model_folder(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere is a missing"):
        read_dense(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        read_dense(tmp_path)
    export(*llama, tmp_path / "out", max_shard_bytes=250_000)
    shard = sorted((tmp_path / "out").glob("model-*"))[1]
    for damage in (lambda: shard.write_bytes(shard.read_bytes()[:-5]), shard.unlink):
        damage()
        with pytest.raises(CheckpointError, match=rf"{shard.name} is .*missing, corrupted"):
            read_dense(tmp_path / "out")
    for content in ("not json", "[]", '{"weight_map": {"a": "../outside.safetensors"}}'):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"nor a valid model\.safetensors\.index\.json"):
            read_dense(tmp_path)

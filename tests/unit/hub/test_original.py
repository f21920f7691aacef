"""Checkpoints in the layout of the original implementation."""

import json
import os
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_config, tiny_trainer
from torch import Tensor

from switchtitan.distributed.world import stop_world
from switchtitan.errors import CheckpointError
from switchtitan.hub.initial_weights import fingerprint, read_initial_weights
from switchtitan.hub.model_folder import read_model_folder
from switchtitan.hub.original import read_original_dense
from switchtitan.models import MODELS

LAYER, OTHER_LAYER = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
RANK, ALPHA = 4, 3.0
SHAPES = {LAYER: (7, 9), OTHER_LAYER: (11, 6)}


def adapted_layer(layer: str) -> dict[str, Tensor]:
    out, into = SHAPES[layer]
    num_candidates = min(out, into)
    generator = torch.Generator().manual_seed(out)
    stored = {
        "weight": torch.randn(out, into, generator=generator),
        "lora_A": torch.randn(RANK, into, generator=generator),
        "lora_B": torch.randn(out, RANK, generator=generator),
        "candidates_A": torch.randn(num_candidates, into, generator=generator),
        "candidates_B": torch.randn(num_candidates, out, generator=generator),
        "candidate_A_index_param": torch.tensor(1, dtype=torch.int32),
        "candidate_B_index_param": torch.tensor(3, dtype=torch.int32),
        "selected_A_indices_param": torch.arange(RANK, dtype=torch.int32),
        "selected_B_indices_param": torch.arange(RANK, dtype=torch.int32),
    }
    for side in "AB":
        stored[f"candidates_{side}_len_param"] = torch.tensor(num_candidates, dtype=torch.int32)
        stored[f"candidates_{side}_weight_param"] = torch.full((num_candidates,), 1 / RANK)
        stored[f"fixed_{side}_steps_param"] = torch.zeros(RANK, dtype=torch.int32)
    return {f"{layer}.{name}": value for name, value in stored.items()}


@pytest.fixture
def stored() -> dict[str, Tensor]:
    return {
        "model.embed_tokens.weight": torch.randn(5, 9, generator=torch.Generator().manual_seed(1)),
        "model.norm.weight": torch.rand(9, generator=torch.Generator().manual_seed(2)),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3),
        **adapted_layer(LAYER),
        **adapted_layer(OTHER_LAYER),
    }


def write(folder: Path, stored: dict[str, Tensor], alpha: float | None = ALPHA) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(stored, folder / "pytorch_model.bin")
    if alpha is not None:
        (folder / "switch_lora_config.json").write_text(
            json.dumps({"r": RANK, "lora_alpha": alpha})
        )
    return folder


def test_dense_weights_are_merged_with_the_runs_scale(
    stored: dict[str, Tensor], tmp_path: Path
) -> None:
    dense = read_original_dense(write(tmp_path, stored))
    for layer in SHAPES:
        weight, lora_a, lora_b = (
            stored[f"{layer}.{name}"].double() for name in ("weight", "lora_A", "lora_B")
        )
        expected = weight + ALPHA / RANK * lora_b @ lora_a
        torch.testing.assert_close(
            dense[f"{layer}.weight"].double(), expected, atol=1e-5, rtol=0
        )  # fp32 product
    assert torch.equal(dense["model.norm.weight"], stored["model.norm.weight"])
    plain = {"model.embed_tokens.weight", "model.norm.weight"}
    assert dense.keys() == plain | {f"{layer}.weight" for layer in SHAPES}


def test_bf16_checkpoints_are_merged_in_fp32(stored: dict[str, Tensor], tmp_path: Path) -> None:
    in_bf16 = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in stored.items()
    }
    in_fp32 = {
        name: value.float() if value.is_floating_point() else value
        for name, value in in_bf16.items()
    }
    merged = read_original_dense(write(tmp_path / "bf16", in_bf16))
    expected = read_original_dense(write(tmp_path / "fp32", in_fp32))
    assert all(torch.equal(merged[name], value) for name, value in expected.items())


def test_full_rank_checkpoints_are_read_as_they_are(tmp_path: Path) -> None:
    stored = {"lm_head.weight": torch.randn(5, 3), "model.norm.weight": torch.rand(3)}
    folder = write(tmp_path, stored, alpha=None)
    dense = read_original_dense(folder)
    assert dense.keys() == stored.keys()
    assert all(torch.equal(dense[name], value) for name, value in stored.items())


def test_sharded_checkpoints_are_read_in_full(stored: dict[str, Tensor], tmp_path: Path) -> None:
    full = read_original_dense(write(tmp_path / "full", stored))
    folder = write(tmp_path / "sharded", {})
    (folder / "pytorch_model.bin").unlink()
    file_of = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(stored)}
    for file in set(file_of.values()):
        torch.save(
            {name: value for name, value in stored.items() if file_of[name] == file}, folder / file
        )
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": file_of}))
    dense = read_original_dense(folder)
    assert all(torch.equal(dense[name], value) for name, value in full.items())


def test_a_low_rank_checkpoint_without_its_alpha_is_refused(
    stored: dict[str, Tensor], tmp_path: Path
) -> None:
    bare = write(tmp_path / "bare", stored, alpha=None)
    with pytest.raises(
        CheckpointError, match=r"switch_lora_config\.json is missing; write .*lora_alpha"
    ):
        read_original_dense(bare)
    (bare / "switch_lora_config.json").write_text('{"lora_alpha": "one"}')
    with pytest.raises(CheckpointError, match=r"switch_lora_config\.json is corrupted"):
        read_original_dense(bare)


def test_the_earlier_layout_with_numbered_candidates_is_read(
    stored: dict[str, Tensor], tmp_path: Path
) -> None:
    expected = read_original_dense(write(tmp_path / "new", stored))
    for side in "AB":
        for layer in SHAPES:
            for number, row in enumerate(stored.pop(f"{layer}.candidates_{side}")):
                stored[f"{layer}.candidates_{side}.{number}"] = row
                stored[f"{layer}.candidates_{side}_weight_param.{number}"] = torch.tensor(0.25)
            del stored[f"{layer}.candidates_{side}_weight_param"]
    folder = write(tmp_path / "old", stored)
    dense = read_original_dense(folder)
    assert dense.keys() == expected.keys()
    assert all(torch.equal(dense[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "model.layers.0.self_attn.q_proj.weight.absmax",
            torch.ones(2),
            r"unknown names: .*weight\.absmax",
        ),
        (
            f"{LAYER}.lora_B",
            torch.ones(8, RANK),
            r"shapes \[\[7, 9\], \[4, 9\], \[8, 4\]\]; expected",
        ),
        (
            f"{LAYER}.weight",
            torch.ones(63, 1, dtype=torch.uint8),
            r"Quantized layers are not supported",
        ),
    ],
)
def test_an_unknown_layout_is_refused_with_the_names(
    stored: dict[str, Tensor], tmp_path: Path, name: str, value: Tensor, words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_original_dense(write(tmp_path, stored | {name: value}))


class Attack:
    """A hostile pickle: loading it would call os.mkdir."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_would_run_code_is_not_loaded(tmp_path: Path) -> None:
    torch.save({"model.norm.weight": Attack(tmp_path / "owned")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="could run code, and is not loaded"):
        read_original_dense(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_damaged_missing_and_foreign_files_are_named(
    stored: dict[str, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither pytorch_model\.bin nor"):
        read_original_dense(tmp_path)
    file = write(tmp_path, stored) / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is corrupted"):
        read_original_dense(tmp_path)
    torch.save([torch.ones(2)], file)
    with pytest.raises(CheckpointError, match="not a state dict"):
        read_original_dense(tmp_path)


def tiny_weights(folder: Path) -> dict[str, Tensor]:
    plain = MODELS.build(tiny_config(folder, "full_rank").model)
    generator = torch.Generator().manual_seed(8)
    return {
        name: parameter.detach() + 0.05 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in plain.named_parameters()
    }


def as_the_original_stores(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Splits the layers in blocks into a frozen weight and factors that add up to the weights."""
    generator = torch.Generator().manual_seed(9)
    stored = {}
    for name, weight in weights.items():
        stored[name] = weight
        if name.endswith("_proj.weight"):
            layer = name.removesuffix(".weight")
            lora_a = torch.randn(RANK, weight.shape[1], generator=generator)
            lora_b = torch.randn(weight.shape[0], RANK, generator=generator)
            stored[name] = weight - ALPHA / RANK * lora_b @ lora_a
            stored |= {f"{layer}.lora_A": lora_a, f"{layer}.lora_B": lora_b}
            stored[f"{layer}.candidates_A"] = torch.ones(min(weight.shape), weight.shape[1])
    return stored


def test_a_run_starts_from_the_original_implementations_folder(corpora: Path) -> None:
    home = corpora / "from-original"
    weights = tiny_weights(home)
    tokens = torch.arange(2 * 13).reshape(2, 13) * 7 % 270
    documents = torch.zeros_like(tokens, dtype=torch.int32)
    plain = MODELS.build(tiny_config(home, "full_rank").model)
    plain.load_state_dict(weights)
    folder = write(home / "model_500", as_the_original_stores(weights))
    start = ("--checkpoint.initial_weights", str(folder))
    trainer = tiny_trainer(home, "switchlora", *start)
    trainer.stepper.close()
    assert trainer.stepper.state.initial_weights == str(folder)
    with torch.no_grad():
        live = trainer.stepper.model(tokens, documents)
        # Weights of 0.05 and products of 3, merged in fp32 and split again.
        torch.testing.assert_close(live, plain(tokens, documents), rtol=1e-3, atol=1e-4)
    before = fingerprint(folder)
    write(folder, as_the_original_stores(weights), alpha=2 * ALPHA)
    assert fingerprint(folder) != before
    other = tiny_trainer(corpora / "from-original-wrong-scale", "switchlora", *start)
    other.stepper.close()
    stop_world()
    with torch.no_grad():
        assert (other.stepper.model(tokens, documents) - live).abs().max() > 0.1


def test_the_config_next_to_the_originals_weights_gives_the_model(tmp_path: Path) -> None:
    """As version 4 of transformers writes it from the original's own configurations."""
    model = tiny_config(tmp_path, "full_rank").model
    weights = tiny_weights(tmp_path)
    folder = write(tmp_path / "model_500", as_the_original_stores(weights))
    described = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "hidden_size": 20,
        "initializer_range": 0.02,
        "intermediate_size": 28,
        "max_sequence_length": 1024,
        "model_type": "llama",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "pad_token_id": -1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 271,
    }
    (folder / "config.json").write_text(json.dumps(described))
    read = MODELS.restore(read_model_folder(folder))
    assert read.architecture() == model.architecture()
    merged = read_initial_weights(folder, read).tensors
    for name, weight in weights.items():
        # Products of 3 are subtracted and added in fp32.
        torch.testing.assert_close(merged[name], weight, rtol=1e-4, atol=1e-5)
    (folder / "config.json").write_text(json.dumps({**described, "num_key_value_heads": 2}))
    with pytest.raises(CheckpointError, match=r"num_key_value_heads = 2, the model has 1"):
        read_initial_weights(folder, model)


def test_the_originals_weights_of_another_model_are_refused(corpora: Path) -> None:
    home = corpora / "from-another-original"
    stored = as_the_original_stores(tiny_weights(home))
    del stored["model.norm.weight"]
    folder = write(home / "model_500", stored)
    with pytest.raises(
        CheckpointError, match=r"initial_weights = .*model\.norm\.weight is missing"
    ):
        tiny_trainer(home, "switchlora", "--checkpoint.initial_weights", str(folder))
    stop_world()

"""Checkpoints laid out as the original implementation writes them."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from switchtitan.errors import CheckpointError
from switchtitan.hub.original import read_original, read_original_dense

LAYER, OTHER_LAYER = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
RANK, ALPHA = 4, 3.0
SHAPES = {LAYER: (7, 9), OTHER_LAYER: (11, 6)}


def ring_after(switches: int, num_candidates: int) -> dict[str, Tensor]:
    """Pointers and slots, switched one vector after the other as the paper's algorithm does."""
    first = list(range(num_candidates - RANK, num_candidates))
    slots = {"A": list(first), "B": [first[(i - RANK // 2) % RANK] for i in range(RANK)]}
    pointer = {"A": 0, "B": RANK // 2}
    for _ in range(switches):
        for side in "AB":
            slots[side][pointer[side]] = (slots[side][pointer[side] - 1] + 1) % num_candidates
            pointer[side] = (pointer[side] + 1) % RANK
    stored = {
        f"candidate_{side}_index_param": torch.tensor(pointer[side], dtype=torch.int32) for side in "AB"
    }
    return stored | {
        f"selected_{side}_indices_param": torch.tensor(slots[side], dtype=torch.int32) for side in "AB"
    }


def adapted_layer(layer: str, switches: int = 0) -> dict[str, Tensor]:
    out, into = SHAPES[layer]
    num_candidates = min(out, into)
    generator = torch.Generator().manual_seed(out)
    stored = {
        "weight": torch.randn(out, into, generator=generator),
        "lora_A": torch.randn(RANK, into, generator=generator),
        "lora_B": torch.randn(out, RANK, generator=generator),
        "candidates_A": torch.randn(num_candidates, into, generator=generator),
        "candidates_B": torch.randn(num_candidates, out, generator=generator),
        **ring_after(switches, num_candidates),
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
        **adapted_layer(LAYER, switches=13),
        **adapted_layer(OTHER_LAYER),
    }


def write(folder: Path, stored: dict[str, Tensor], alpha: float | None = ALPHA) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(stored, folder / "pytorch_model.bin")
    if alpha is not None:
        (folder / "switch_lora_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": alpha}))
    return folder


def test_factors_and_candidates_come_under_our_names(stored: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint = read_original(write(tmp_path, stored))
    assert (checkpoint.rank, checkpoint.alpha) == (RANK, ALPHA)
    for layer in SHAPES:
        assert torch.equal(checkpoint.tensors[f"{layer}.weight"], stored[f"{layer}.weight"])
        assert torch.equal(checkpoint.tensors[f"{layer}.lora_a"], stored[f"{layer}.lora_A"])
        assert torch.equal(checkpoint.tensors[f"{layer}.lora_b"], stored[f"{layer}.lora_B"].T)
        assert torch.equal(checkpoint.tensors[f"{layer}.candidates_a"], stored[f"{layer}.candidates_A"])
        assert torch.equal(checkpoint.tensors[f"{layer}.candidates_b"], stored[f"{layer}.candidates_B"])
    plain = {"model.embed_tokens.weight", "model.norm.weight"}
    parts = ("weight", "lora_a", "lora_b", "candidates_a", "candidates_b")
    assert checkpoint.tensors.keys() == plain | {f"{layer}.{part}" for layer in SHAPES for part in parts}


def test_number_of_switches_is_found_from_the_rings_position(tmp_path: Path) -> None:
    for switches in range(50):
        stored = adapted_layer(LAYER, switches) | adapted_layer(OTHER_LAYER, switches)
        found = read_original(write(tmp_path, stored)).num_switched
        assert found == {LAYER: switches % math.lcm(RANK, 7), OTHER_LAYER: switches % math.lcm(RANK, 6)}


def test_dense_weights_are_merged_with_the_runs_scale(stored: dict[str, Tensor], tmp_path: Path) -> None:
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
        name: value.bfloat16() if value.is_floating_point() else value for name, value in stored.items()
    }
    in_fp32 = {name: value.float() if value.is_floating_point() else value for name, value in in_bf16.items()}
    merged = read_original_dense(write(tmp_path / "bf16", in_bf16))
    expected = read_original_dense(write(tmp_path / "fp32", in_fp32))
    assert all(torch.equal(merged[name], value) for name, value in expected.items())
    assert read_original(tmp_path / "bf16").tensors[f"{LAYER}.lora_a"].dtype == torch.bfloat16


def test_full_rank_checkpoints_are_read_as_they_are(tmp_path: Path) -> None:
    stored = {"lm_head.weight": torch.randn(5, 3), "model.norm.weight": torch.rand(3)}
    folder = write(tmp_path, stored, alpha=None)
    dense = read_original_dense(folder)
    assert dense.keys() == stored.keys()
    assert all(torch.equal(dense[name], value) for name, value in stored.items())
    with pytest.raises(CheckpointError, match="full-rank checkpoint"):
        read_original(folder)


def test_sharded_checkpoints_are_read_whole(stored: dict[str, Tensor], tmp_path: Path) -> None:
    whole = read_original_dense(write(tmp_path / "whole", stored))
    folder = write(tmp_path / "sharded", {})
    (folder / "pytorch_model.bin").unlink()
    file_of = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(stored)}
    for file in set(file_of.values()):
        torch.save({name: value for name, value in stored.items() if file_of[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": file_of}))
    dense = read_original_dense(folder)
    assert all(torch.equal(dense[name], value) for name, value in whole.items())


def test_alpha_comes_from_the_folder_or_the_caller_and_never_from_both(
    stored: dict[str, Tensor], tmp_path: Path
) -> None:
    bare = write(tmp_path / "bare", stored, alpha=None)
    with pytest.raises(CheckpointError, match=r"switch_lora_config\.json is missing; give .* alpha"):
        read_original_dense(bare)
    assert read_original(bare / "pytorch_model.bin", alpha=2.0).alpha == 2.0
    with pytest.raises(CheckpointError, match=r"alpha = 2\.0 was given, but .* says 3\.0"):
        read_original(write(tmp_path / "both", stored), alpha=2.0)


def test_candidates_drawn_at_random_can_be_merged_but_not_gone_on_from(
    stored: dict[str, Tensor], tmp_path: Path
) -> None:
    stored[f"{LAYER}.selected_A_indices_param"] = torch.tensor([6, 0, 3, 1], dtype=torch.int32)
    folder = write(tmp_path, stored)
    with pytest.raises(CheckpointError, match="not switched in order"):
        read_original(folder)
    assert f"{LAYER}.weight" in read_original_dense(folder)


def test_the_earlier_layout_can_be_merged_but_not_gone_on_from(
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
    with pytest.raises(CheckpointError, match=r"has no candidates_a \[7, 9\]"):
        read_original(folder)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.layers.0.self_attn.q_proj.weight.absmax", torch.ones(2), r"unknown names: .*weight\.absmax"),
        (f"{LAYER}.lora_B", torch.ones(8, RANK), r"shapes \[\[7, 9\], \[4, 9\], \[4, 8\]\]; expected"),
        (f"{LAYER}.weight", torch.ones(63, 1, dtype=torch.uint8), r"Quantised layers cannot be read"),
        (f"{LAYER}.candidates_A", torch.ones(6, 9), r"has no candidates_a \[7, 9\]"),
    ],
)
def test_an_unknown_layout_is_refused_by_name(
    stored: dict[str, Tensor], tmp_path: Path, name: str, value: Tensor, words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_original(write(tmp_path, stored | {name: value}))


class Attack:
    """What a hostile pickle looks like: loading it would call os.mkdir."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_would_run_code_is_not_opened(tmp_path: Path) -> None:
    torch.save({"model.norm.weight": Attack(tmp_path / "owned")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="could run code, and is not opened"):
        read_original_dense(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_damaged_missing_and_foreign_files_are_named(stored: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither pytorch_model\.bin nor"):
        read_original_dense(tmp_path)
    file = write(tmp_path, stored) / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged"):
        read_original_dense(tmp_path)
    torch.save([torch.ones(2)], file)
    with pytest.raises(CheckpointError, match="not a state dict"):
        read_original_dense(tmp_path)

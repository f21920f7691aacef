"""The comparison of an export with its checkpoint, the memory of an export, and its model card."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.held_weights import HeldWeights
from support.trained import save_run
from torch import Tensor

from switchtitan.checkpoint import find_given, read_metadata
from switchtitan.cli import export
from switchtitan.cli.export import Target
from switchtitan.errors import CheckpointError
from switchtitan.hub import export_folder
from switchtitan.hub.dense_checkpoint import DenseCheckpoint, module_of
from switchtitan.hub.peft_folder import ADAPTER_NAME
from switchtitan.hub.verify_export import verify_export
from switchtitan.observability.environment import versions


@pytest.fixture(scope="module")
def saved(corpora: Path) -> Path:
    """A run's checkpoint."""
    return find_given(save_run(corpora / "verify"))


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [(torch.float32, 0, 1e-5), (torch.bfloat16, 1e-4, 2e-2)]
)
def test_exports_compute_the_logits_of_their_checkpoint(
    saved: Path, tmp_path: Path, dtype: torch.dtype, least: float, most: float
) -> None:
    export.export_merged(saved, Target(tmp_path / "out", dtype, 20_000, verify=None))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert least <= verify_export(DenseCheckpoint(saved), tmp_path / "out", dtype) < most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("damage", ["weight", "rope_theta", "rms_norm_eps"])
def test_another_model_is_found(
    saved: Path, tmp_path: Path, damage: str, dtype: torch.dtype
) -> None:
    out = tmp_path / "out"
    export.export_merged(saved, Target(out, dtype, verify=None))
    if damage == "weight":
        damage_weights(out / "model.safetensors", "model.layers.1.mlp.up_proj.weight")
    else:
        config = json.loads((out / "config.json").read_text())
        values = {"rope_theta": 20_000.0, "rms_norm_eps": 1e-3}
        config[damage] = values[damage]
        config.get("rope_parameters", {}).update({damage: values[damage]})
        (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="computes other logits than the checkpoint"):
        verify_export(DenseCheckpoint(saved), out, dtype)


def damage_weights(file: Path, name: str) -> None:
    weights = load_file(file)
    weights[name] *= 1.01
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (ADAPTER_NAME, "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"),
        (ADAPTER_NAME, "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"),
        ("base/model.safetensors", "model.layers.1.mlp.up_proj.weight"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_adapter_is_found(
    saved: Path, tmp_path: Path, file: str, name: str, dtype: torch.dtype
) -> None:
    out = tmp_path / "out"
    export.export_adapter(saved, Target(out, dtype, verify=None))
    assert verify_export(DenseCheckpoint(saved), out, dtype) < 2e-2
    damage_weights(out / file, name)
    with pytest.raises(CheckpointError, match="computes other logits than the checkpoint"):
        verify_export(DenseCheckpoint(saved), out, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_with_other_logits_is_not_kept(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    def read_wrongly(self: DenseCheckpoint, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: 1.01 * value for name, value in read(self, names).items()}

    read = DenseCheckpoint.read
    monkeypatch.setattr(DenseCheckpoint, "read", read_wrongly)
    with pytest.raises(CheckpointError, match="computes other logits than the checkpoint"):
        export.export_merged(saved, Target(tmp_path / "out", dtype))
    assert list(tmp_path.iterdir()) == []


class CountedWeights(HeldWeights):
    """Weights that remember what was read at a time."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.groups: list[list[str]] = []

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        self.groups.append(list(names))
        return super().read(self.groups[-1])


def test_an_export_reads_one_module_at_a_time_into_files_of_bounded_size(
    saved: Path, tmp_path: Path
) -> None:
    dense = DenseCheckpoint(saved)
    weights = CountedWeights(dense.read(dense.shapes))
    export_folder.export_dense(
        weights, dense.config, tmp_path / "out", torch.float32, max_shard_bytes=30_000
    )
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 33_000 for file in files)
    assert all(len({module_of(name) for name in group}) == 1 for group in weights.groups)
    assert sorted(name for group in weights.groups for name in group) == sorted(dense.shapes)


def test_a_module_is_read_without_the_others_and_without_candidates(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = DenseCheckpoint(saved)
    layer = "model.layers.1.mlp.up_proj"
    tensors = dense.read_trained([layer])
    assert sorted(tensors) == [f"{layer}.lora_a", f"{layer}.lora_b", f"{layer}.weight"]
    assert torch.equal(
        dense.read([f"{layer}.weight"])[f"{layer}.weight"],
        dense.read(dense.shapes)[f"{layer}.weight"],
    )


def test_the_model_card_states_method_data_steps_losses_and_command(
    saved: Path, tmp_path: Path
) -> None:
    export.main([str(saved), "--folder", str(tmp_path / "out"), "--max-shard-size", "30KB"])
    card = (tmp_path / "out" / "README.md").read_text()
    metadata = read_metadata(saved)
    assert "| method | switchlora, rank 6 |" in card
    assert "| steps | 7 |" in card
    assert f"| tokens seen | {metadata.train_state['tokens_seen']} |" in card
    assert f"`switchtitan export {saved} --folder {tmp_path / 'out'} --max-shard-size 30KB`" in card
    assert f"| trained with | torch {versions()['torch']}, switchtitan 0" in card
    assert metadata.config.strip() in card


@pytest.mark.parametrize("size", ["5", "0GB", "-1GB", "1TB", "x"])
def test_wrong_sizes_are_refused(
    size: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        export.main([str(saved), "--folder", str(tmp_path / "out"), f"--max-shard-size={size}"])
    assert stopped.value.code == 2
    assert f"'{size}': expected a size" in capsys.readouterr().err

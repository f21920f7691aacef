"""The comparison of an export with its checkpoint, the memory of an export, and its model card."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import run
from support.folders import HeldWeights
from support.trained import save_run

from switchtitan import models
from switchtitan.checkpoint.load import find_given
from switchtitan.errors import CheckpointError
from switchtitan.hub import export_folder
from switchtitan.hub.dense_checkpoint import DenseCheckpoint, module_of
from switchtitan.hub.peft_folder import ADAPTER_NAME
from switchtitan.hub.verify_export import verify_export

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def saved(corpora):
    """A run's checkpoint."""
    return find_given(save_run(corpora / "verify"))


def export(checkpoint, folder, dtype=FP32, *words):
    """Exports without a comparison."""
    dtype_name = str(dtype).removeprefix("torch.")
    words = ("--folder", folder, "--dtype", dtype_name, "--no-verify", *words)
    outcome = run("export", checkpoint, *words)
    assert outcome.status == 0, outcome.errors


LEAST = {FP32: 1.01, BF16: -1.0}
"""Factors of one weight that the check of an adapter finds; one in bf16 has rounded factors."""


def damage_weights(file, name, factor):
    weights = load_file(file)
    weights[name] *= factor
    save_file(weights, file, metadata={"format": "pt"})


def damage_config(file, key, value):
    config = json.loads(file.read_text())
    config[key] = value
    config.get("rope_parameters", {}).update({key: value})
    file.write_text(json.dumps(config))


def check_that_others_are_found(saved, folder, dtype):
    with pytest.raises(CheckpointError, match="computes other logits than the checkpoint"):
        verify_export(DenseCheckpoint(saved), folder, dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_another_weight_or_another_number_of_the_model_is_found(saved, tmp_path, dtype):
    out = tmp_path / "out"
    export(saved, out, dtype)
    # Both sides compute with weights that are rounded to this dtype.
    assert verify_export(DenseCheckpoint(saved), out, dtype) < 1e-5
    written = (out / "config.json").read_text()
    for key, value in {"rope_theta": 20_000.0, "rms_norm_eps": 1e-3}.items():
        damage_config(out / "config.json", key, value)
        check_that_others_are_found(saved, out, dtype)
        (out / "config.json").write_text(written)
    damage_weights(out / "model.safetensors", "model.layers.1.mlp.up_proj.weight", 1.01)
    check_that_others_are_found(saved, out, dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_another_factor_or_base_weight_of_an_adapter_is_found(saved, tmp_path, dtype):
    out = tmp_path / "out"
    export(saved, out, dtype, "--format", "peft")
    assert verify_export(DenseCheckpoint(saved), out, dtype) < 2e-2
    layers = "base_model.model.model.layers"
    for file, name in (
        (ADAPTER_NAME, f"{layers}.1.mlp.up_proj.lora_A.weight"),
        (ADAPTER_NAME, f"{layers}.0.mlp.up_proj.lora_B.weight"),
        ("base/model.safetensors", "model.layers.1.mlp.up_proj.weight"),
    ):
        written = (out / file).read_bytes()
        damage_weights(out / file, name, LEAST[dtype])
        check_that_others_are_found(saved, out, dtype)
        (out / file).write_bytes(written)


def test_weights_that_are_not_a_number_are_found(saved, tmp_path):
    out = tmp_path / "out"
    export(saved, out)
    damage_weights(out / "model.safetensors", "model.norm.weight", float("nan"))
    check_that_others_are_found(saved, out, FP32)


def test_an_export_with_other_logits_is_not_kept(saved, tmp_path, monkeypatch):
    def save_wrongly(weights, file, **keys):
        save_file({name: 1.01 * value for name, value in weights.items()}, file, **keys)

    monkeypatch.setattr(export_folder, "save_file", save_wrongly)
    outcome = run("export", saved, "--folder", tmp_path / "out")
    outcome.check_refused("computes other logits than the checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_a_buffer_that_no_weight_is_cannot_be_compared(saved, tmp_path, monkeypatch):
    checkpoint, build = DenseCheckpoint(saved), models.MODELS.build
    export(saved, tmp_path / "out")

    def build_with_a_buffer(config):
        model = build(config)
        model.register_buffer("offsets", torch.zeros(3), persistent=False)
        return model

    monkeypatch.setattr(models.MODELS, "build", build_with_a_buffer)
    with pytest.raises(CheckpointError, match=r"'llama'.* buffer offsets .*--no-verify"):
        verify_export(checkpoint, tmp_path / "out", FP32)


class CountedWeights(HeldWeights):
    """Weights that remember what was read at a time."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.groups = []

    def read(self, names):
        self.groups.append(list(names))
        return super().read(self.groups[-1])


def test_an_export_reads_one_module_at_a_time_into_files_of_bounded_size(saved, tmp_path):
    dense, out = DenseCheckpoint(saved), tmp_path / "out"
    weights = CountedWeights(dense.read())
    export_folder.export_dense(weights.read, dense.config, out, FP32, max_shard_bytes=30_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 33_000 for file in files)
    assert all(len({module_of(name) for name in group}) == 1 for group in weights.groups)
    assert sorted(name for group in weights.groups for name in group) == sorted(dense.names)

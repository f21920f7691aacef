"""The comparison of an export with its checkpoint."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import run, succeed
from support.folders import change_json
from support.trained import train_and_save

from switchtitan import models
from switchtitan.checkpoint.load import find_given
from switchtitan.errors import CheckpointError
from switchtitan.hub import export_folder
from switchtitan.hub.export_folder import verify_export
from switchtitan.hub.initial_weights import DenseCheckpoint
from switchtitan.hub.peft_folder import ADAPTER_NAME

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def saved(corpora):
    """A run's checkpoint."""
    train_and_save(corpora / "verify", "switchlora")
    return find_given(corpora / "verify" / "run")


def export(checkpoint, folder, dtype=FP32, *words):
    """Exports without a comparison."""
    dtype_name = str(dtype).removeprefix("torch.")
    words = ("--folder", folder, "--dtype", dtype_name, "--no-verify", *words)
    succeed("export", checkpoint, *words)


def damage(file, key, value):
    """Changes a key of a file of JSON, or multiplies a weight."""
    if file.suffix == ".json":
        change_json(file, {key: value})
    else:
        weights = load_file(file)
        weights[key] *= value
        save_file(weights, file, metadata={"format": "pt"})


UP_PROJ = "model.layers.1.mlp.up_proj"
FACTORS = [f"base_model.model.{UP_PROJ}.lora_{name}.weight" for name in "AB"]
ROPE = {"rope_type": "default", "rope_theta": 20_000.0}
FORMATS = {
    "transformers": [
        ("config.json", "rope_parameters", ROPE),
        ("config.json", "rms_norm_eps", 1e-3),
        ("model.safetensors", f"{UP_PROJ}.weight", None),
        ("model.safetensors", "model.norm.weight", float("nan")),
    ],
    "peft": [
        *((ADAPTER_NAME, factor, None) for factor in FACTORS),
        ("base/model.safetensors", f"{UP_PROJ}.weight", None),
    ],
}
"""Format -> files, with a key and its changed value, or the name of a weight and its factor."""


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("form", FORMATS)
def test_another_weight_or_another_number_of_the_model_is_found(saved, tmp_path, form, dtype):
    out = tmp_path / "out"
    export(saved, out, dtype, "--format", form)
    # Both sides compute with weights that are rounded to this dtype, but not with rounded factors.
    limit, factor = (2e-2, -1.0) if (form, dtype) == ("peft", BF16) else (1e-5, 1.01)
    assert verify_export(DenseCheckpoint(saved), out, dtype) < limit
    for name, key, value in FORMATS[form]:
        written = (out / name).read_bytes()
        damage(out / name, key, value or factor)
        with pytest.raises(CheckpointError, match="computes other logits than the checkpoint"):
            verify_export(DenseCheckpoint(saved), out, dtype)
        (out / name).write_bytes(written)


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

"""PEFT computes a run's logits from its exported adapter, and adapters of others are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from support.commands import run
from support.trained import train_and_save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers import LlamaConfig as TheirConfig

from switchtitan.builders.trained_model import open_trained_model
from switchtitan.checkpoint import find_given
from switchtitan.cli import export
from switchtitan.errors import CheckpointError
from switchtitan.hub.dense_checkpoint import DenseCheckpoint, read_dense_checkpoint
from switchtitan.hub.peft_config import ADAPTER_CONFIG_NAME
from switchtitan.hub.peft_folder import ADAPTER_NAME, read_adapted
from switchtitan.hub.verify_export import verify_export

TOKENS = torch.arange(2 * 13).reshape(2, 13) * 7 % 270


def saved_run(folder: Path, method: str) -> tuple[Path, Tensor]:
    """Trains a few steps; returns the run's folder and its logits."""
    trainer = train_and_save(folder, method)
    with torch.no_grad():
        logits = trainer.stepper.model(TOKENS, torch.zeros_like(TOKENS, dtype=torch.int32))
    return folder / "run", logits


@pytest.fixture(scope="module")
def exported(corpora: Path) -> tuple[Path, Path, Tensor]:
    """A run, its adapter and its logits."""
    run_folder, logits = saved_run(corpora / "export-peft", "switchlora")
    folder = corpora / "export-peft" / "adapter"
    export.main([str(run_folder), "--folder", str(folder), "--format", "peft"])
    return run_folder, folder, logits


@pytest.mark.parametrize("method", ["lora", "relora"])
def test_peft_computes_the_logits_of_a_run(corpora: Path, method: str) -> None:
    run_folder, ours = saved_run(corpora / f"export-peft-{method}", method)
    folder = run_folder.parent / "adapter"
    export.main([str(run_folder), "--folder", str(folder), "--format", "peft"])
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    theirs = PeftModel.from_pretrained(base, folder)
    # Two implementations of LLaMA in float32 differ by 1e-5.
    torch.testing.assert_close(theirs(TOKENS).logits, ours, rtol=1e-5, atol=1e-5)
    with theirs.disable_adapter():
        assert not torch.allclose(theirs(TOKENS).logits, ours, rtol=1e-3, atol=1e-3)


def test_an_adapter_names_its_base_and_has_a_tokenizer(
    exported: tuple[Path, Path, Tensor],
) -> None:
    _, folder, ours = exported
    theirs = AutoPeftModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(theirs(TOKENS).logits, ours, rtol=1e-5, atol=1e-5)
    for place in (folder, folder / "base"):
        tokenizer = AutoTokenizer.from_pretrained(place)
        assert tokenizer.decode(tokenizer("x = 1\n")["input_ids"]) == "x = 1\n"


def test_reading_an_exported_adapter_gives_the_runs_dense_weights(
    exported: tuple[Path, Path, Tensor],
) -> None:
    run_folder, folder, _ = exported
    dense = read_dense_checkpoint(find_given(run_folder))
    trained = open_trained_model(folder)
    assert trained.tensors.keys() == dense.keys()
    assert all(torch.equal(trained.tensors[name], dense[name]) for name in dense)
    assert trained.config.dimensions() == open_trained_model(run_folder).config.dimensions()


def test_the_comparison_of_logits_finds_another_scale(
    exported: tuple[Path, Path, Tensor], tmp_path: Path
) -> None:
    run_folder, folder, _ = exported
    checkpoint = DenseCheckpoint(find_given(run_folder))
    assert verify_export(checkpoint, folder, torch.float32) < 1e-5
    copy = copied(folder, tmp_path, lambda config: config.update(lora_alpha=7))
    with pytest.raises(CheckpointError, match="computes other logits"):
        verify_export(checkpoint, copy, torch.float32)


@pytest.mark.parametrize("method", ["full_rank", "galore", "low_rank"])
def test_a_method_without_frozen_weights_has_no_adapter(
    corpora: Path, method: str, tmp_path: Path
) -> None:
    run_folder, _ = saved_run(corpora / f"export-peft-{method}", method)
    words = ("export", run_folder, "--folder", tmp_path / "out", "--format", "peft")
    run(*words).check_refused("--format peft", f"name = {method!r} has no frozen weights")
    assert not (tmp_path / "out").exists()


THEIRS = TheirConfig(
    vocab_size=53,
    hidden_size=36,
    intermediate_size=29,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_of_peft_is_merged(tmp_path: Path, use_rslora: bool) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(THEIRS)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 4},
        alpha_pattern={"model.layers.1.mlp.down_proj": 9},
        init_lora_weights=False,
        use_rslora=use_rslora,
    )
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "adapter" / "base")
    ours = open_trained_model(tmp_path / "adapter").load(torch.device("cpu"), torch.float32)
    tokens = TOKENS % 53
    with torch.no_grad():
        expected = adapted(tokens).logits
        found = ours(tokens, torch.zeros_like(tokens, dtype=torch.int32))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def copied(folder: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Returns a copy of an adapter with another configuration and the same base."""
    copy = to / "copy"
    copy.mkdir()
    (copy / "base").symlink_to(folder / "base")
    (copy / ADAPTER_NAME).write_bytes((folder / ADAPTER_NAME).read_bytes())
    config = json.loads((folder / ADAPTER_CONFIG_NAME).read_text())
    change(config)
    (copy / ADAPTER_CONFIG_NAME).write_text(json.dumps(config))
    return copy


def test_damaged_adapters_are_refused(exported: tuple[Path, Path, Tensor], tmp_path: Path) -> None:
    copy = copied(exported[1], tmp_path, lambda config: None)
    data = (copy / ADAPTER_NAME).read_bytes()
    (copy / ADAPTER_NAME).write_bytes(data[:-9])
    with pytest.raises(CheckpointError, match=ADAPTER_NAME):
        read_adapted(copy)
    (copy / ADAPTER_NAME).unlink()
    with pytest.raises(CheckpointError, match=ADAPTER_NAME):
        read_adapted(copy)
    (copy / "base").unlink()
    config = json.loads((copy / ADAPTER_CONFIG_NAME).read_text())
    (copy / ADAPTER_CONFIG_NAME).write_text(
        json.dumps(config | {"base_model_name_or_path": "owner/model"})
    )
    (copy / ADAPTER_NAME).write_bytes(data)
    with pytest.raises(CheckpointError, match="'owner/model': no such folder; put the base"):
        read_adapted(copy)

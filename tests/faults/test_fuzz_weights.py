"""Damaged weights (safetensors, Hugging Face's layout, the original's) are refused, or valid."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.fuzzing import FuzzError, fuzz, num_cases
from support.held_weights import HeldWeights
from support.mutations import mutate_bytes, mutate_json
from support.tiny import tiny_config

from switchtitan.contracts import ModelConfig
from switchtitan.hub import huggingface
from switchtitan.hub.export_folder import export_dense
from switchtitan.hub.huggingface import parameter_shapes, read_config
from switchtitan.hub.initial_weights import read_initial_weights
from switchtitan.hub.model_folder import read_model_folder
from switchtitan.models import MODELS
from switchtitan.models.llama.config import LlamaConfig
from switchtitan.models.qwen2.config import Qwen2Config


@pytest.fixture(scope="module")
def model(corpora: Path) -> ModelConfig:
    return tiny_config(corpora / "fuzzed-weights", "full_rank").model


@pytest.fixture(scope="module")
def weights(model: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in parameter_shapes(model).items()
    }


def damaged_safetensors(valid: bytes, draw: random.Random) -> bytes:
    """Changes bytes, the header's length or the header's values."""
    length = int.from_bytes(valid[:8], "little")
    header, data = valid[8 : 8 + length], valid[8 + length :]
    chosen = draw.random()
    if chosen < 0.3:
        return mutate_bytes(valid, draw)
    if chosen < 0.4:
        extreme = draw.choice((0, 1, length - 1, length + 1, 10**8, 2**31, 2**63, 2**64 - 1))
        return extreme.to_bytes(8, "little") + header + data
    if chosen < 0.5:
        changed = mutate_bytes(header, draw)
    else:
        changed = mutate_json(json.loads(header), draw).encode()
    return len(changed).to_bytes(8, "little") + changed + data


@pytest.fixture
def damage_safetensors(
    weights: dict[str, torch.Tensor], tmp_path: Path
) -> Callable[[random.Random], bytes]:
    file = tmp_path / "model.safetensors"
    save_file(weights, file)
    valid = file.read_bytes()

    def damage(draw: random.Random) -> bytes:
        data = damaged_safetensors(valid, draw)
        file.write_bytes(data)
        return data[:1000]

    return damage


@pytest.mark.parametrize("part", range(4))
def test_a_damaged_safetensors_file(
    damage_safetensors: Callable[[random.Random], bytes],
    model: ModelConfig,
    tmp_path: Path,
    part: int,
    bounded_memory: None,
) -> None:
    number = num_cases(2500, 25)
    fuzz(
        "weights: safetensors",
        damage_safetensors,
        lambda: read_initial_weights(tmp_path / "model.safetensors", model),
        range(part * number, (part + 1) * number),
    )


def test_a_planted_fault_is_found(
    damage_safetensors: Callable[[random.Random], bytes],
    model: ModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reader that does not handle the library's errors."""
    monkeypatch.setattr(huggingface, "SafetensorError", ZeroDivisionError)
    with pytest.raises(FuzzError, match="SafetensorError"):
        fuzz(
            "planted",
            damage_safetensors,
            lambda: read_initial_weights(tmp_path / "model.safetensors", model),
            range(25),
        )


@pytest.mark.parametrize("part", range(4))
def test_a_damaged_hugging_face_folder(
    weights: dict[str, torch.Tensor],
    model: ModelConfig,
    tmp_path: Path,
    part: int,
    bounded_memory: None,
) -> None:
    exported = tmp_path / "exported"
    export_dense(HeldWeights(weights), model, exported, torch.float32, max_shard_bytes=20_000)
    shard = min(exported.glob("model-00001-of-*.safetensors")).name
    files = ("config.json", "model.safetensors.index.json", shard)
    folder = Path(shutil.copytree(exported, tmp_path / "damaged"))

    def damage(draw: random.Random) -> str:
        for name in files:
            shutil.copyfile(exported / name, folder / name)
        name = draw.choice(files)
        valid = (exported / name).read_bytes()
        if name.endswith(".safetensors"):
            (folder / name).write_bytes(damaged_safetensors(valid, draw))
        elif draw.random() < 0.3:
            (folder / name).write_bytes(mutate_bytes(valid, draw))
        else:
            (folder / name).write_text(mutate_json(json.loads(valid), draw))
        return f"{name}: {(folder / name).read_bytes()[:1000]!r}"

    number = num_cases(2500, 20)
    fuzz(
        "weights: Hugging Face's layout",
        damage,
        lambda: read_initial_weights(folder, model),
        range(part * number, (part + 1) * number),
    )


@pytest.mark.parametrize("part", range(4))
def test_a_damaged_config_that_gives_the_architecture(tmp_path: Path, part: int) -> None:
    file = tmp_path / "config.json"
    rope = {"rope_factor": 8.0, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0}
    models = [
        LlamaConfig(size="9m", rope_type="llama3", rope_original_positions=64, **rope),
        Qwen2Config(size="9m", num_kv_heads=2, tied_head=True),
    ]
    described = [model.huggingface_config(512) for model in models]

    def damage(draw: random.Random) -> str:
        valid = draw.choice(described)
        if draw.random() < 0.1:
            file.write_bytes(mutate_bytes(json.dumps(valid).encode(), draw))
        else:
            file.write_text(mutate_json(valid, draw))
        return repr(file.read_bytes()[:1000])

    def read() -> None:
        config = MODELS.restore(read_model_folder(tmp_path))
        assert parameter_shapes(config)
        assert config.check_huggingface_config(read_config(file)) == []

    number = num_cases(2500, 25)
    fuzz(
        "weights: config.json that gives the architecture",
        damage,
        read,
        range(part * number, (part + 1) * number),
        min_refused=0.1,
    )


@pytest.mark.parametrize("part", range(4))
def test_a_damaged_folder_of_the_original_implementation(
    weights: dict[str, torch.Tensor],
    model: ModelConfig,
    tmp_path: Path,
    part: int,
    bounded_memory: None,
) -> None:
    layer = next(name for name in weights if "q_proj" in name).removesuffix(".weight")
    out, into = weights[f"{layer}.weight"].shape
    factors = {f"{layer}.lora_A": torch.ones(3, into), f"{layer}.lora_B": torch.ones(out, 3)}
    torch.save(weights | factors, tmp_path / "pytorch_model.bin")
    (tmp_path / "switch_lora_config.json").write_text('{"r": 3, "lora_alpha": 2.0}')
    files = ("pytorch_model.bin", "switch_lora_config.json")
    valid = {name: (tmp_path / name).read_bytes() for name in files}

    def damage(draw: random.Random) -> str:
        for name in files:
            (tmp_path / name).write_bytes(valid[name])
        name = draw.choice((*files, files[0], files[0]))
        if name == files[1] and draw.random() < 0.7:
            (tmp_path / name).write_text(mutate_json(json.loads(valid[name]), draw))
        else:
            (tmp_path / name).write_bytes(mutate_bytes(valid[name], draw))
        return f"{name}: {(tmp_path / name).read_bytes()[:300]!r}"

    number = num_cases(2500, 15)
    fuzz(
        "weights: the original's",
        damage,
        lambda: read_initial_weights(tmp_path, model),
        range(part * number, (part + 1) * number),
        min_refused=0.05,
    )

"""What a trained model is opened with: its weights in one dtype, its tokenizer and stop tokens."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.folders import save_random_model
from torch import Tensor

from switchtitan.builders.trained_model import (
    TrainedModel,
    find_tokenizer,
    open_tokenizer,
    open_trained_model,
    stop_tokens,
)
from switchtitan.data.tokenizer import read_tokenizer, train_tokenizer
from switchtitan.errors import CorpusError
from switchtitan.hub.peft_config import ADAPTER_CONFIG_NAME
from switchtitan.hub.peft_folder import ADAPTER_NAME

CPU = torch.device("cpu")


class WatchedTensors(dict[str, Tensor]):
    """Counts the tensors in memory each time that one is taken out."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__({name: tensor.clone() for name, tensor in tensors.items()})
        self.references = [weakref.ref(tensor) for tensor in self.values()]
        self.num_alive: list[int] = []

    def pop(self, name: str) -> Tensor:  # type: ignore[override]
        self.num_alive.append(sum(reference() is not None for reference in self.references))
        return super().pop(name)


def test_loading_frees_each_weight_after_its_conversion(tmp_path: Path) -> None:
    opened = open_trained_model(save_random_model("llama", tmp_path / "model"))
    given = dict(opened.tensors)
    tensors = WatchedTensors(given)
    trained = TrainedModel(opened.source, opened.config, tensors, None, opened.found_config)
    model = trained.load(CPU, torch.bfloat16)
    assert not trained.tensors
    assert tensors.num_alive == list(range(len(given), 0, -1))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, given[name].to(torch.bfloat16))
    # The control: in their own dtype there is no copy, and all stay.
    tensors = WatchedTensors(given)
    trained = TrainedModel(opened.source, opened.config, tensors, None, opened.found_config)
    model = trained.load(CPU, torch.float32)
    assert tensors.num_alive == [len(given)] * len(given)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a tokenizer and two stop tokens."""
    folder = save_random_model("llama", tmp_path / "model")
    (folder / "tokenizer.json").write_text(train_tokenizer(["one two three"] * 3, 270).serialized)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 8]}))
    return folder


def make_adapter(folder: Path, base: Path) -> Path:
    """Writes an adapter as PEFT does: without the files of its base."""
    folder.mkdir()
    layer = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {"A": torch.zeros(2, 54), "B": torch.zeros(77, 2)}
    save_file(
        {f"{layer}.lora_{name}.weight": factor for name, factor in factors.items()},
        folder / ADAPTER_NAME,
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base)}
    (folder / ADAPTER_CONFIG_NAME).write_text(json.dumps(config))
    return folder


def test_an_adapter_has_the_tokenizer_and_the_stops_of_its_base(base: Path, tmp_path: Path) -> None:
    trained = open_trained_model(make_adapter(tmp_path / "adapter", base))
    tokenizer = open_tokenizer(trained)
    assert tokenizer.sha256 == read_tokenizer(base).sha256
    assert stop_tokens(trained, tokenizer) == {5, 8}


def test_an_adapters_own_tokenizer_and_stops_count(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", base)
    own = train_tokenizer(["four five six"] * 3, 280)
    (folder / "tokenizer.json").write_text(own.serialized)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    trained = open_trained_model(folder)
    tokenizer = open_tokenizer(trained)
    assert tokenizer.sha256 == read_tokenizer(folder).sha256 != read_tokenizer(base).sha256
    assert stop_tokens(trained, tokenizer) == {9}


def test_without_a_tokenizer_both_folders_are_named(base: Path, tmp_path: Path) -> None:
    (base / "tokenizer.json").unlink()
    folder = make_adapter(tmp_path / "adapter", base)
    trained = open_trained_model(folder)
    assert find_tokenizer(trained) is None
    with pytest.raises(CorpusError, match=rf"none in {folder} or {base}; pass --tokenizer"):
        open_tokenizer(trained)
    with pytest.raises(CorpusError, match=rf"none in {base}; pass --tokenizer"):
        open_tokenizer(open_trained_model(base))

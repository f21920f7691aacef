"""Write and read LoRA adapters in the layout of Hugging Face's PEFT."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from switchtitan.distributed.precision import full_precision
from switchtitan.errors import CheckpointError, abbreviate
from switchtitan.files import file_inside
from switchtitan.hub.dense_checkpoint import DenseCheckpoint
from switchtitan.hub.huggingface import CONFIG_NAME, read_dense
from switchtitan.hub.peft_config import ADAPTER_CONFIG_NAME, read_adapter_config
from switchtitan.hub.weight_files import find_weight_files, open_weights

ADAPTER_NAME = "adapter_model.safetensors"
BASE_FOLDER = "base"
"""The frozen model, inside the adapter's folder."""
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


class BaseWeights:
    """The weights of a checkpoint without its low-rank updates; a `hub.export_folder.DenseWeights`.

    Raises:
        CheckpointError: if the checkpoint has no low-rank updates.
    """

    def __init__(self, checkpoint: DenseCheckpoint) -> None:
        if not checkpoint.low_rank_updates():
            raise CheckpointError(
                f"--format peft: [method] name = {checkpoint.method_name!r} has no frozen weights "
                "with a low-rank update; export it without --format"
            )
        self._checkpoint = checkpoint
        self.shapes: Mapping[str, tuple[int, ...]] = checkpoint.shapes

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Returns some of the weights."""
        return self._checkpoint.read_base(names)


def write_adapter(
    checkpoint: DenseCheckpoint, folder: Path, base: Path, dtype: torch.dtype
) -> None:
    """Writes the low-rank updates of a checkpoint as an adapter that PEFT loads.

    PEFT's B is [out, rank], and its scale is `lora_alpha` / `r`.

    Args:
        folder: an existing folder.
        base: where the base model will be, for `AutoPeftModelForCausalLM`.
        dtype: of the stored factors.
    """
    updates = checkpoint.low_rank_updates()
    ranks = {layer: update.lora_a.shape[0] for layer, update in updates.items()}
    alphas = {layer: update.scale * ranks[layer] for layer, update in updates.items()}
    rank, alpha = _most_frequent(ranks.values()), _most_frequent(alphas.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        # Of layers that differ from `r` and `lora_alpha`.
        "rank_pattern": {layer: value for layer, value in ranks.items() if value != rank},
        "alpha_pattern": {layer: value for layer, value in alphas.items() if value != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": sorted(updates),
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / ADAPTER_CONFIG_NAME).write_text(text, encoding="utf-8")
    factors = {}
    for layer in updates:
        update = checkpoint.read_low_rank_update(layer)
        for name, factor in (("A", update.lora_a), ("B", update.lora_b.t())):
            factors[f"{_PREFIX}{layer}.lora_{name}.weight"] = factor.to(dtype).contiguous()
    save_file(factors, folder / ADAPTER_NAME, metadata={"format": "pt"})


def is_adapter(path: Path) -> bool:
    """Whether `path` is the folder of an adapter."""
    return (path / ADAPTER_CONFIG_NAME).is_file()


def folder_of_model(path: Path) -> Path:
    """Returns the folder of an adapter's base model, or `path` itself if it is no adapter.

    Raises:
        CheckpointError: as `Adapter`.
    """
    return Adapter(path).base if is_adapter(path) else path


class Adapter:
    """An adapter and the folder of its base model.

    Raises:
        CheckpointError: if a file is missing or damaged, the base model is not on this machine, or
            the adapter is of a kind that is not supported.
    """

    def __init__(self, folder: Path) -> None:
        self._config = read_adapter_config(folder)
        self.base = _base_of(folder, self._config.base_model_name_or_path)
        (self._file,) = find_weight_files(file_inside(folder, ADAPTER_NAME), ADAPTER_NAME)
        self.layers: set[str] = set()
        """The layers that it updates."""
        with open_weights(self._file) as opened:
            for name in opened.keys():  # noqa: SIM118
                match = _FACTOR.fullmatch(name)
                if match is None:
                    raise CheckpointError(f"{self._file}: {name}: expected a factor of a layer")
                self.layers.add(match[1])

    @full_precision()
    def updated(self, name: str, weight: Tensor) -> Tensor:
        """Returns a weight of the base model plus its update, in fp32, or the same without one."""
        layer = name.removesuffix(".weight")
        if layer not in self.layers:
            return weight
        names = [f"{_PREFIX}{layer}.lora_{factor}.weight" for factor in "BA"]
        with open_weights(self._file) as opened:
            lora_b, lora_a = (opened.get_tensor(name).float() for name in names)
        rank, shapes = self._config.rank_of(layer), [list(lora_b.shape), list(lora_a.shape)]
        if weight.dim() != 2 or shapes != [[weight.shape[0], rank], [rank, weight.shape[1]]]:
            raise CheckpointError(
                f"{self._file}: {layer}: factors of shape {shapes[0]} and {shapes[1]} do not fit "
                f"r = {rank} in {ADAPTER_CONFIG_NAME} and the weight of shape {list(weight.shape)}"
            )
        return torch.addmm(weight.float(), lora_b, lora_a, alpha=self._config.scale_of(layer))


def read_adapted(folder: Path) -> dict[str, Tensor]:
    """Returns the weights of an adapter's base with the adapter merged into them, by name.

    Raises:
        CheckpointError: as `Adapter`, and if the adapter updates a layer that the base lacks.
    """
    adapter = Adapter(folder)
    weights = read_dense(adapter.base)
    if missing := sorted(adapter.layers - {name.removesuffix(".weight") for name in weights}):
        raise CheckpointError(f"{adapter.base} lacks {abbreviate(missing)}, which {folder} updates")
    return {name: adapter.updated(name, weight) for name, weight in weights.items()}


def _base_of(folder: Path, named: object) -> Path:
    own = folder / BASE_FOLDER
    if own.is_dir():
        return own
    if isinstance(named, str) and "\0" not in named and (Path(named) / CONFIG_NAME).is_file():
        return Path(named)
    raise CheckpointError(
        f"{folder / ADAPTER_CONFIG_NAME}: base_model_name_or_path = {named!r}: no such folder; "
        f"put the base model into {own}"
    )


def _most_frequent(values: Iterable[Any]) -> Any:
    listed = list(values)
    return max(listed, key=listed.count)

"""Writes and reads LoRA adapters in the layout of Hugging Face's PEFT."""

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from switchtitan.contracts import LowRankUpdate
from switchtitan.distributed.precision import full_precision
from switchtitan.errors import CheckpointError, abbreviate
from switchtitan.hub.huggingface import (
    CONFIG_NAME,
    ReadWeight,
    read_config,
    read_dense,
    write_json,
)
from switchtitan.registry import explain

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_NAME = "adapter_model.safetensors"
BASE_FOLDER = "base"
"""The frozen model, inside the adapter's folder."""
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_WITHOUT_EFFECT = {
    *("auto_mapping", "eva_config", "inference_mode", "lora_dropout", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "task_type"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"),
}
"""Keys that do not change what given factors compute."""


class PeftConfig(BaseModel):
    """The keys of `adapter_config.json` that decide what a plain LoRA adapter computes."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    peft_type: Literal["LORA"]
    bias: Literal["none"] = "none"
    # The others, e.g. "olora" or "pissa", change the base model when PEFT loads the adapter.
    init_lora_weights: Literal[False, True, "gaussian", "orthogonal", "eva", "mica"] = True
    use_rslora: bool = False
    r: int = Field(gt=0)
    lora_alpha: float
    base_model_name_or_path: str | None = None

    @property
    def scale(self) -> float:
        """The factor of a layer's update."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def read_adapter_config(folder: Path) -> PeftConfig:
    """Reads an adapter's configuration; a CheckpointError names a key that is not plain LoRA's."""
    file = folder / ADAPTER_CONFIG_NAME
    # PEFT writes all its keys; those that are empty or false ask for nothing.
    given = {
        key: value
        for key, value in read_config(file).items()
        if value is not None
        and (key in PeftConfig.model_fields or (value and key not in _WITHOUT_EFFECT))
    }
    try:
        return PeftConfig.model_validate(given)
    except ValidationError as error:
        raise CheckpointError(
            f"{file}: {explain(error)}; only plain LoRA is read; if PEFT can merge the adapter, "
            "merge it with merge_and_unload() first"
        ) from error


def write_adapter(
    updates: Iterable[tuple[str, LowRankUpdate]],
    folder: Path,
    base: Path,
    dtype: torch.dtype,
    task_type: str | None,
) -> None:
    """Writes low-rank updates, by the layer's name, as an adapter that PEFT loads.

    PEFT's B is [out, rank], and its scale is `lora_alpha` / `r`: that of the first layer. A of a
    layer with another scale is multiplied by their ratio.

    Args:
        base: where the base model will be, for `AutoPeftModelForCausalLM`.
        dtype: of the stored factors.
        task_type: PEFT's name of the class of models; None for any module.
    """
    factors: dict[str, Tensor] = {}
    layers: list[str] = []
    for layer, update in updates:
        if not layers:
            rank, scale = len(update.lora_a), update.scale
        layers.append(layer)
        lora_a = update.lora_a * (update.scale / scale)
        for name, factor in (("A", lora_a), ("B", update.lora_b.t())):
            factors[f"base_model.model.{layer}.lora_{name}.weight"] = factor.to(dtype).contiguous()
    save_file(factors, folder / ADAPTER_NAME, metadata={"format": "pt"})
    config = PeftConfig(
        peft_type="LORA", r=rank, lora_alpha=scale * rank, base_model_name_or_path=str(base)
    )
    others = {"task_type": task_type, "inference_mode": True, "target_modules": sorted(layers)}
    write_json(folder / ADAPTER_CONFIG_NAME, {**config.model_dump(), **others})


def is_adapter(path: Path) -> bool:
    """Whether `path` is the folder of an adapter."""
    return (path / ADAPTER_CONFIG_NAME).is_file()


def folder_of_model(path: Path) -> Path:
    """Returns the folder of an adapter's base model, or `path` itself if it is no adapter. Raises a
    CheckpointError if the adapter is not supported, or its base is not on this machine."""
    if not is_adapter(path):
        return path
    own, named = path / BASE_FOLDER, read_adapter_config(path).base_model_name_or_path
    if own.is_dir():
        return own
    if named is not None and os.path.exists(Path(named) / CONFIG_NAME):
        return Path(named)
    raise CheckpointError(
        f"{path / ADAPTER_CONFIG_NAME}: base_model_name_or_path = {named!r}: no such folder; "
        f"put the base model into {own}"
    )


def folders_of(path: Path) -> list[Path]:
    """Returns the folder of weights, and after an adapter's that of its base, whose tokenizer and
    config.json PEFT does not copy; see `folder_of_model`."""
    if not path.is_dir():
        return [path.parent]
    return list(dict.fromkeys([path, folder_of_model(path)]))


def merging_reader(path: Path, weights: Mapping[str, Tensor]) -> ReadWeight:
    """Returns what reads one of `weights` by name; those of an adapter's base with the adapter
    merged, in fp32. Raises a CheckpointError if a file is missing or damaged, or if factors do not
    fit the base or the configuration."""
    if not is_adapter(path):
        return weights.__getitem__
    config, file = read_adapter_config(path), path / ADAPTER_NAME
    factors: dict[str, dict[str, Tensor]] = {}
    for name, factor in read_dense(path, ADAPTER_NAME).items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{file}: {name}: expected a factor of a layer")
        factors.setdefault(f"{match[1]}.weight", {})[match[2]] = factor
    if missing := sorted(factors.keys() - weights.keys()):
        raise CheckpointError(f"{path} updates {abbreviate(missing)}, which its base lacks")

    def read(name: str) -> Tensor:
        if name not in factors:
            return weights[name]
        return _merged(weights[name], factors[name], config, f"{file}: {name}")

    return read


@full_precision()
def _merged(
    weight: Tensor, factors: Mapping[str, Tensor], config: PeftConfig, place: str
) -> Tensor:
    """Returns `weight` [out, in] + scale * B [out, r] A [r, in], in fp32."""
    shapes = {key: list(factor.shape) for key, factor in factors.items()}
    out_by_in = list(weight.shape)
    if shapes != {"A": [config.r, *out_by_in[1:]], "B": [*out_by_in[:1], config.r]}:
        raise CheckpointError(
            f"{place}: factors of shapes {shapes} do not fit r = {config.r} in "
            f"{ADAPTER_CONFIG_NAME} and the weight of shape {out_by_in}"
        )
    lora_b, lora_a = factors["B"].float(), factors["A"].float()
    return torch.addmm(weight.float(), lora_b, lora_a, alpha=config.scale)

"""Read the `adapter_config.json` of a LoRA adapter of Hugging Face's PEFT."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from switchtitan.errors import CheckpointError
from switchtitan.hub.huggingface import read_config
from switchtitan.models.llama.huggingface import Count, mistakes

ADAPTER_CONFIG_NAME = "adapter_config.json"
_HINT = "if PEFT can merge the adapter, merge it with merge_and_unload() first"
_WITHOUT_EFFECT = {
    "auto_mapping",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
}
"""Keys that do not change what given factors compute. Any other key has to be empty or false."""
Value = TypeVar("Value")


def _check_patterns(patterns: dict[str, Value]) -> dict[str, Value]:
    try:
        for pattern in patterns:
            _compiled(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error
    return patterns


def _compiled(pattern: str) -> re.Pattern[str]:
    # As PEFT's `get_pattern_key`: a regular expression for a name, or for its last parts.
    return re.compile(rf"(.*\.)?({pattern})$")


Patterns = Annotated[
    dict[str, Value],
    AfterValidator(_check_patterns),
    Field(description="an object: regular expression of layers -> number"),
]


class AdapterConfig(BaseModel):
    """The configuration of a plain LoRA adapter. A description says what is expected, for the error
    message."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    peft_type: Literal["LORA"] = Field(description="'LORA'")
    bias: Literal["none"] = Field("none", description="'none'")
    use_rslora: bool = Field(False, description="true or false")
    # The others, e.g. "olora" or "pissa", change the base model when PEFT loads the adapter.
    init_lora_weights: Literal[False, True, "gaussian", "orthogonal", "eva", "mica"] = Field(
        True, description="true, false, 'gaussian', 'orthogonal', 'eva' or 'mica'"
    )
    r: Count
    lora_alpha: float = Field(description="a number")
    rank_pattern: Patterns[Count] = {}
    alpha_pattern: Patterns[float] = {}
    base_model_name_or_path: Any = None
    """The name or folder of the base model, as the file gives it."""

    @model_validator(mode="after")
    def _check_other_keys(self) -> Self:
        others = self.model_extra or {}
        wrong = [key for key in others.keys() - _WITHOUT_EFFECT if others[key]]
        if wrong:
            listed = "; ".join(f"{key} = {others[key]!r}" for key in sorted(wrong))
            raise ValueError(f"{listed}: not supported")
        return self

    def rank_of(self, layer: str) -> int:
        """Returns the rank of a layer's factors."""
        return _value_for(layer, self.rank_pattern, self.r)

    def scale_of(self, layer: str) -> float:
        """Returns the factor of a layer's update."""
        rank = self.rank_of(layer)
        alpha = _value_for(layer, self.alpha_pattern, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Reads the configuration of an adapter.

    Raises:
        CheckpointError: if the file is damaged, or describes an adapter that is not supported;
            names the key.
    """
    file = folder / ADAPTER_CONFIG_NAME
    given = {key: value for key, value in read_config(file).items() if value is not None}
    try:
        return AdapterConfig.model_validate(given)
    except ValidationError as error:
        problems = "; ".join(mistakes(error, AdapterConfig, given))
        raise CheckpointError(f"{file}: {problems}; {_HINT}") from error


def _value_for(layer: str, patterns: Mapping[str, Value], default: Value) -> Value:
    """Returns the value of the first pattern that matches a layer."""
    matching = (value for key, value in patterns.items() if _compiled(key).match(layer))
    return next(matching, default)

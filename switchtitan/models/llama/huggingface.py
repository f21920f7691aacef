"""The `config.json` of LLaMA and its family in Hugging Face's layout.

Both spellings of the rotary keys are known: transformers 5 writes rope_parameters, version 4
rope_theta and rope_scaling.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from switchtitan.errors import ConfigError
from switchtitan.models.llama.rope import ROPE_KEYS, RopeType

Count = Annotated[int, Field(gt=0, description="an integer above 0")]
OptionalCount = Annotated[int | None, Field(gt=0, description="an integer above 0")]
Positive = Annotated[float, Field(gt=0, description="a number above 0")]
OptionalPositive = Annotated[float | None, Field(gt=0, description="a number above 0")]
Off = Annotated[Literal[False], Field(description="false")]


class Supported(BaseModel):
    """Keys that may ask for what these models do not compute. A description says what is expected,
    for the error message."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    hidden_act: Literal["silu"] = Field("silu", description="'silu'")
    attention_bias: Off = False
    mlp_bias: Off = False
    use_sliding_window: Off = False
    quantization_config: dict[str, Any] = Field(
        {}, max_length=0, description="weights that are not quantized"
    )
    layer_types: list[Literal["full_attention"]] = Field(
        [], description="'full_attention' for all layers"
    )
    sliding_window: None = Field(
        None, description="null, since attention within a window is not supported"
    )
    rope_scaling: dict[str, Any] = Field({}, description="an object")
    partial_rotary_factor: float = Field(1.0, ge=1, le=1, description="1")


class ConfigJson(Supported):
    """Keys of `[model]`, with those of a config.json as aliases, and the defaults of transformers'
    classes."""

    hidden_size: Count
    intermediate_size: Count
    num_layers: Count = Field(alias="num_hidden_layers")
    num_heads: Count = Field(alias="num_attention_heads")
    num_kv_heads: OptionalCount = Field(alias="num_key_value_heads")
    head_dim: OptionalCount = None
    vocab_size: Count
    norm_eps: Positive = Field(1e-6, alias="rms_norm_eps")
    tied_head: bool = Field(False, alias="tie_word_embeddings", description="true or false")
    init_std: Positive = Field(0.02, alias="initializer_range")
    max_positions: OptionalCount = Field(None, alias="max_position_embeddings")
    rope_theta: Positive = 10000.0
    rope_type: RopeType = Field("default", description=f"one of {', '.join(map(repr, ROPE_KEYS))}")
    rope_factor: OptionalPositive = Field(None, alias="factor")
    rope_low_freq_factor: OptionalPositive = Field(None, alias="low_freq_factor")
    rope_high_freq_factor: OptionalPositive = Field(None, alias="high_freq_factor")
    rope_original_positions: OptionalCount = Field(None, alias="original_max_position_embeddings")

    @model_validator(mode="after")
    def _check_rope(self) -> Self:
        missing = [key for key in ROPE_KEYS[self.rope_type] if getattr(self, key) is None]
        if missing:
            fields = [type(self).model_fields[key] for key in missing]
            raise ValueError(
                "; ".join(f"{one.alias} is missing: expected {one.description}" for one in fields)
            )
        return self


_THEIR_KEYS = {
    key: field.alias or key
    for key, field in ConfigJson.model_fields.items()
    if key not in Supported.model_fields
}
"""Keys of `[model]` -> those of config.json."""
_WITHOUT_EFFECT = ("init_std", "max_positions")
"""Keys that the function of given weights does not depend on."""


def read_config(found: Mapping[str, Any]) -> dict[str, object]:
    """Returns the keys of `[model]`, without its name.

    Raises:
        ConfigError: names every key that is missing, of a wrong type or not supported.
    """
    given = _with_rope(found)
    # Other classes of the family have another default than the number of query heads.
    if found.get("model_type", "llama") == "llama" or "num_key_value_heads" in found:
        given.setdefault("num_key_value_heads", None)
    if found.get("model_type") == "mistral":
        given["sliding_window"] = found.get("sliding_window", 4096)  # of an absent key
    else:
        given.pop("sliding_window", None)
    try:
        read = ConfigJson.model_validate(given)
    except ValidationError as error:
        raise ConfigError("; ".join(mistakes(error, ConfigJson, given))) from error
    unused = set(ROPE_KEYS["llama3"]) - set(ROPE_KEYS[read.rope_type])
    keys = read.model_dump(include=_THEIR_KEYS.keys() - unused)
    keys["num_kv_heads"] = read.num_kv_heads or read.num_heads
    if read.head_dim is None and read.hidden_size % read.num_heads == 0:
        keys["head_dim"] = read.hidden_size // read.num_heads
    return keys


def _with_rope(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys that are not null, with those of the rotary embedding among them."""
    given = {key: value for key, value in found.items() if value is not None}
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
    given["rope_scaling"] = rope
    if not isinstance(rope, dict):
        return given
    kind = rope.get("rope_type", rope.get("type", "default"))
    needed = ROPE_KEYS.get(kind, ()) if isinstance(kind, str) else ()
    scaling = {_THEIR_KEYS[key]: rope.get(_THEIR_KEYS[key]) for key in needed}
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is not None:
            given[key] = rope[key]
    return {**given, **scaling, "rope_type": kind}


def mistakes(error: ValidationError, model: type[BaseModel], given: Mapping[str, Any]) -> list[str]:
    """Returns a message for each wrong key: the key, its value, and the description of its field.

    Args:
        given: what `model` was read from.
    """
    expected = {field.alias or key: field.description for key, field in model.model_fields.items()}
    messages = []
    for detail in error.errors():
        if not detail["loc"]:
            messages.append(str(detail["ctx"]["error"]))
            continue
        key = str(detail["loc"][0])
        value = f"{key} = {given[key]!r}" if given.get(key) is not None else f"{key} is missing"
        messages.append(f"{value}: expected {expected[key]}")
    return list(dict.fromkeys(messages))


def write_config(
    architecture: Mapping[str, Any], init_std: float, max_positions: int
) -> dict[str, object]:
    """Returns a config.json that all versions of transformers read, without the class's name.

    Args:
        architecture: as `LlamaFamilyConfig.architecture` returns it.
    """
    kind, theta = architecture["rope"]["kind"], architecture["rope"]["theta"]
    scaling = {
        _THEIR_KEYS[key]: architecture["rope"][key.removeprefix("rope_")] for key in ROPE_KEYS[kind]
    }
    rope = {"rope_type": kind, "rope_theta": theta, **scaling}
    return {
        **{_THEIR_KEYS[key]: value for key, value in architecture.items() if key in _THEIR_KEYS},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": init_std,
        "max_position_embeddings": max_positions,
        "rope_theta": theta,
        "rope_parameters": rope,
        **({"rope_scaling": rope} if scaling else {}),
    }


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Returns error messages for the keys in which a config.json differs from a model's.

    Raises:
        ConfigError: as `read_config`.
    """
    found, expected = read_config(theirs), read_config(ours)
    return [
        f"{name} = {found.get(key)!r}, the model has {expected.get(key)!r}"
        for key, name in _THEIR_KEYS.items()
        if key not in _WITHOUT_EFFECT and found.get(key) != expected.get(key)
    ]

"""The `config.json` of LLaMA and its family in Hugging Face's layout.

Absent keys have the defaults of transformers' classes. Both spellings of the rotary keys are known:
transformers 5 writes rope_parameters, version 4 rope_theta and rope_scaling.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from switchtitan.errors import ConfigError
from switchtitan.models.llama.dimensions import LlamaDimensions
from switchtitan.models.llama.rope import ROPE_KEYS

_THEIR_KEYS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "tied_head": "tie_word_embeddings",
    "rope_theta": "rope_theta",
    "rope_type": "rope_type",
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_positions": "original_max_position_embeddings",
}
"""Keys of `[model]` that the function of the weights depends on -> those of config.json."""


def read_config(found: Mapping[str, Any]) -> dict[str, object]:
    """Returns the keys of `[model]`, without its name.

    Raises:
        ConfigError: names every key that is missing, of a wrong type or not supported.
    """
    reader = _Reader(found)
    _check_supported(reader)
    keys: dict[str, object] = {
        key: reader.positive(_THEIR_KEYS[key], int)
        for key in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "vocab_size")
    }
    # Other classes of the family have another default than the number of query heads.
    is_llama = found.get("model_type", "llama") == "llama"
    if "num_key_value_heads" not in found and not is_llama:
        reader.add("num_key_value_heads is missing")
    keys["num_kv_heads"] = reader.positive("num_key_value_heads", int, keys["num_heads"])
    hidden_size, num_heads = keys["hidden_size"], keys["num_heads"]
    if isinstance(hidden_size, int) and isinstance(num_heads, int):
        head_dim, rest = divmod(hidden_size, num_heads)
        keys["head_dim"] = reader.positive("head_dim", int, None if rest else head_dim)
    keys["norm_eps"] = reader.positive("rms_norm_eps", float, 1e-6)
    keys["init_std"] = reader.positive("initializer_range", float, 0.02)
    keys["max_positions"] = reader.positive("max_position_embeddings", int, None)
    keys["tied_head"] = reader.boolean("tie_word_embeddings")
    keys |= _read_rope(reader)
    reader.raise_problems()
    return keys


def write_config(dims: LlamaDimensions, max_positions: int) -> dict[str, object]:
    """Returns a config.json that all versions of transformers read, without the class's name."""
    ours = _plain_keys(dims)
    scaling = {_THEIR_KEYS[key]: ours[key] for key in ROPE_KEYS[dims.rope.kind]}
    written = {
        _THEIR_KEYS[key]: value for key, value in ours.items() if not key.startswith("rope_")
    }
    rope = {"rope_type": dims.rope.kind, "rope_theta": dims.rope.theta, **scaling}
    return {
        **written,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": dims.init_std,
        "max_position_embeddings": max_positions,
        "rope_theta": dims.rope.theta,
        "rope_parameters": rope,
        **({"rope_scaling": rope} if scaling else {}),
    }


def differences(theirs: Mapping[str, object], dims: LlamaDimensions) -> list[str]:
    """Returns error messages for the keys in which a config.json differs from a model.

    Args:
        theirs: as `read_config` returns them.
    """
    ours = _plain_keys(dims)
    return [
        f"{name} = {theirs.get(key)!r}, the model has {ours.get(key)!r}"
        for key, name in _THEIR_KEYS.items()
        if theirs.get(key) != ours.get(key)
    ]


def _plain_keys(dims: LlamaDimensions) -> dict[str, object]:
    """Returns the model's values of the keys in `_THEIR_KEYS`, without those of other scalings."""
    rope = {f"rope_{key}": value for key, value in asdict(dims.rope).items()}
    rope_keys = ("rope_theta", *ROPE_KEYS[dims.rope.kind])
    return {
        **{key: value for key, value in asdict(dims).items() if key in _THEIR_KEYS},
        "rope_type": dims.rope.kind,
        **{key: rope[key] for key in rope_keys},
    }


class _Reader:
    """Reads typed values, and collects what is wrong with them."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.found = found
        self._problems: list[str] = []

    def add(self, problem: str) -> None:
        self._problems.append(problem)

    def raise_problems(self) -> None:
        """Raises a `ConfigError` with all problems if there are any."""
        if self._problems:
            raise ConfigError("; ".join(self._problems))

    def positive(
        self,
        key: str,
        kind: type[float],
        *default: object,
        among: Mapping[str, Any] | None = None,
    ) -> object:
        """Returns a number above 0, or the default if the key is absent or null."""
        value: Any = (self.found if among is None else among).get(key)
        if value is None and default:
            return default[0]
        is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if is_number and 0 < value <= sys.float_info.max:
            return kind(value)
        what = "an integer above 0" if kind is int else "a number above 0"
        given = f"{key} is missing" if value is None else f"{key} = {value!r}"
        self.add(f"{given}: expected {what}")
        return None

    def boolean(self, key: str) -> bool:
        """Returns a boolean, False if the key is absent or null."""
        value = self.found.get(key)
        if value is not None and not isinstance(value, bool):
            self.add(f"{key} = {value!r}: expected true or false")
        return bool(value)


def _check_supported(reader: _Reader) -> None:
    """Adds a problem for every key that asks for what this model does not compute."""
    found = reader.found
    if (activation := found.get("hidden_act", "silu")) != "silu":
        reader.add(f"hidden_act = {activation!r}: expected 'silu'")
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if found.get(key):
            reader.add(f"{key} = {found[key]!r}: expected false")
    if found.get("quantization_config"):
        reader.add("quantization_config: expected weights that are not quantized")
    layer_types = found.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        reader.add(f"layer_types = {layer_types!r}: expected 'full_attention' for all layers")
    # An absent key means a window of 4096 tokens.
    if found.get("model_type") == "mistral" and found.get("sliding_window", 4096) is not None:
        reader.add(
            f"sliding_window = {found.get('sliding_window', 4096)!r}: expected null, since "
            "attention within a window is not supported"
        )


def _read_rope(reader: _Reader) -> dict[str, object]:
    """Returns the keys of `[model]` for the rotary embedding."""
    found = reader.found
    rope = found.get("rope_scaling") or found.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        reader.add(f"rope_scaling = {rope!r}: expected an object")
        return {}
    if rope.get("partial_rotary_factor", found.get("partial_rotary_factor")) not in (None, 1, 1.0):
        reader.add("partial_rotary_factor: expected 1")
    theta_from = rope if rope.get("rope_theta") is not None else found
    keys: dict[str, object] = {
        "rope_theta": reader.positive("rope_theta", float, 10000.0, among=theta_from)
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        supported = ", ".join(map(repr, ROPE_KEYS))
        reader.add(f"rope_type = {kind!r}: expected one of {supported}")
        return keys
    keys["rope_type"] = kind
    for key in ROPE_KEYS[kind]:
        number = int if key == "rope_original_positions" else float
        keys[key] = reader.positive(_THEIR_KEYS[key], number, among=rope)
    return keys

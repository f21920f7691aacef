"""The `config.json` of LLaMA and its family, as transformers 4 and 5 write it."""

from collections.abc import Mapping
from typing import Any

from switchtitan.errors import ConfigError

SCALING_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_positions"),
}
"""The keys `rope_...` of `[model]` that each `rope_type` needs; see `model.rotary_frequencies`."""
_ROPE_KEYS = {
    "rope_theta": "rope_theta",
    "rope_type": "rope_type",
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_positions": "original_max_position_embeddings",
}
_KEYS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "tied_head": "tie_word_embeddings",
    "init_std": "initializer_range",
    "max_positions": "max_position_embeddings",
}
THEIR_KEYS = _KEYS | _ROPE_KEYS
"""Keys of `[model]` -> those of config.json."""
_REQUIRED = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "vocab_size")
_ONLY_SUPPORTED: dict[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1,
    "quantization_config": {},
}
"""Keys that may ask for what these models do not compute -> the value that does not."""


def read_config(found: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the keys of `[model]` that a config.json sets, not validated, without its name, and a
    message for each key that asks for something that these models do not compute. Raises a
    ConfigError that names the keys that are missing."""
    # transformers 5 writes rope_parameters, version 4 rope_theta and rope_scaling.
    given = {key: value for key, value in found.items() if value is not None}
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"rope_scaling = {rope!r}: expected an object")
    given |= {key: value for key, value in rope.items() if value is not None}
    given["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    scaling = [f"rope_{name}" for name in SCALING_KEYS.get(str(given["rope_type"]), ())]
    required = [*_REQUIRED, *scaling]
    if found.get("model_type", "llama") != "llama" and "num_key_value_heads" not in found:
        # Other classes of the family have another default than the number of query heads.
        required.append("num_kv_heads")
    missing = [THEIR_KEYS[key] for key in required if THEIR_KEYS[key] not in given]
    if missing:
        raise ConfigError("; ".join(f"{key} is missing" for key in missing))
    read = [*_KEYS, "rope_theta", "rope_type", *scaling]
    keys = {key: given[THEIR_KEYS[key]] for key in read if THEIR_KEYS[key] in given}
    return keys, _unsupported(found, given)


def _unsupported(found: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{key} = {given[key]!r}: expected {supported!r}"
        for key, supported in _ONLY_SUPPORTED.items()
        if given.get(key, supported) != supported
    ]
    window = found.get("sliding_window", 4096)  # of an absent key
    if found.get("model_type") == "mistral" and window is not None:
        problems.append(f"sliding_window = {window!r}: expected null, attention to all tokens")
    layers = given.get("layer_types", [])
    if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
        problems.append(f"layer_types = {layers!r}: expected 'full_attention' for all layers")
    return problems


def write_config(keys: Mapping[str, Any]) -> dict[str, object]:
    """Returns a config.json that all versions of transformers read, without the class's name, from
    the keys of `[model]` that `THEIR_KEYS` has."""
    rope = {theirs: keys[key] for key, theirs in _ROPE_KEYS.items() if keys[key] is not None}
    return {
        **{theirs: keys[key] for key, theirs in _KEYS.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": keys["rope_theta"],
        "rope_parameters": rope,
        **({} if keys["rope_type"] == "default" else {"rope_scaling": rope}),
    }

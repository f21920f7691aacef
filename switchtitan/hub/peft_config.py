"""Read the `adapter_config.json` of a LoRA adapter of Hugging Face's PEFT."""

import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from switchtitan.errors import CheckpointError
from switchtitan.hub.huggingface import read_config

ADAPTER_CONFIG_NAME = "adapter_config.json"
_HINT = "if PEFT can merge the adapter, merge it with merge_and_unload() first"
_ALLOWED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "use_rslora": (None, False, True),
    # The others, e.g. "olora" or "pissa", change the base model when PEFT loads the adapter.
    "init_lora_weights": (None, False, True, "gaussian", "orthogonal", "eva", "mica"),
}
"""Keys that decide what an adapter computes -> the values that are supported."""
_READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "base_model_name_or_path"}
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


class AdapterConfig:
    """The configuration of a plain LoRA adapter.

    Raises:
        CheckpointError: if the file is damaged, or describes an adapter that is not supported;
            names the key.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / ADAPTER_CONFIG_NAME
        self._keys = read_config(self._file)
        self._check_kind()
        self._ranks = self._patterns("rank_pattern")
        self._alphas = self._patterns("alpha_pattern")
        self.base: object = self._keys.get("base_model_name_or_path")
        """The name or folder of the base model, as the file gives it."""

    def scale_of(self, layer: str, rank: int) -> float:
        """Returns the factor of a layer's update.

        Args:
            rank: of the layer's stored factors.

        Raises:
            CheckpointError: if its alpha is no number, or the file states another rank.
        """
        alpha = _value_for(layer, self._alphas, self._keys.get("lora_alpha"))
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not is_number or not abs(alpha) <= sys.float_info.max:
            raise CheckpointError(f"{self._file}: lora_alpha = {alpha!r}: expected a number")
        stated = _value_for(layer, self._ranks, self._keys.get("r"))
        if stated != rank or rank < 1:
            raise CheckpointError(
                f"{self._file}: r = {stated!r} for {layer}: its factors have rank {rank}; the "
                "folder is damaged"
            )
        return float(alpha / (math.sqrt(rank) if self._keys.get("use_rslora") else rank))

    def _check_kind(self) -> None:
        for key, allowed in _ALLOWED.items():
            value = self._keys.get(key)
            if value not in allowed:
                names = ", ".join(repr(name) for name in allowed if name is not None)
                raise CheckpointError(
                    f"{self._file}: {key} = {value!r} is not supported: expected {names}; {_HINT}"
                )
        for key in sorted(self._keys.keys() - _ALLOWED.keys() - _READ - _WITHOUT_EFFECT):
            if self._keys[key]:
                raise CheckpointError(
                    f"{self._file}: {key} = {self._keys[key]!r} is not supported; {_HINT}"
                )

    def _patterns(self, key: str) -> dict[re.Pattern[str], object]:
        patterns = self._keys.get(key) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{self._file}: {key} = {patterns!r}: expected an object")
        try:
            # As PEFT's `get_pattern_key`: a regular expression for a name, or for its last parts.
            return {re.compile(rf"(.*\.)?({name})$"): value for name, value in patterns.items()}
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{self._file}: {key} = {patterns!r}: a key is no regular expression ({error}); "
                "fix it, or remove it"
            ) from error


def _value_for(layer: str, patterns: Mapping[re.Pattern[str], object], default: Any) -> Any:
    """Returns the value of the first pattern that matches a layer."""
    return next((value for key, value in patterns.items() if key.match(layer)), default)

"""Read the `[model]` section from a folder in Hugging Face's layout."""

from pathlib import Path

from pydantic import ValidationError

from switchtitan.contracts import ModelConfig
from switchtitan.errors import CheckpointError, ConfigError
from switchtitan.files import exists
from switchtitan.hub.huggingface import CONFIG_NAME, read_config
from switchtitan.hub.peft_folder import folder_of_model
from switchtitan.models import MODELS


def read_model_folder(folder: Path) -> dict[str, object]:
    """Returns all keys of `[model]` that a folder's config.json determines, with `name`.

    Args:
        folder: in Hugging Face's layout, or with a PEFT adapter, whose base model is read.

    Raises:
        ConfigError: if there is no config.json, or it describes a model that is not supported;
            names the keys, and what is supported.
    """
    try:
        file = folder_of_model(folder) / CONFIG_NAME
        if not exists(file):
            raise ConfigError(f"no file {file}; expected a folder in Hugging Face's layout")
        found = read_config(file)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    model_type = found.get("model_type")
    config_type = _by_model_type().get(model_type) if isinstance(model_type, str) else None
    if config_type is None:
        supported = ", ".join(map(repr, sorted(_by_model_type())))
        raise ConfigError(f"{file}: model_type = {model_type!r}: expected one of {supported}")
    try:
        keys = config_type.keys_from_huggingface(found)
        config = config_type.model_validate(keys)
    except ValidationError as error:
        problems = "; ".join(
            ".".join([*map(str, detail["loc"]), ""]) + " " * bool(detail["loc"]) + detail["msg"]
            for detail in error.errors()
        )
        raise ConfigError(f"{file}: {problems}") from error
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return {"name": config.name, **keys}


def _by_model_type() -> dict[str, type[ModelConfig]]:
    return {
        model_type: config_type
        for config_type in MODELS.config_types().values()
        for model_type in config_type.huggingface_types
    }

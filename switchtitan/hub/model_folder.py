"""The model that a folder in Hugging Face's layout describes, as a `[model]` section."""

from pathlib import Path

from pydantic import ValidationError

from switchtitan.contracts import ModelConfig
from switchtitan.errors import CheckpointError, ConfigError
from switchtitan.hub.huggingface import CONFIG_NAME, mistakes_in, read_config
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
        found = read_config(file)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    by_type = {
        model_type: config_type
        for config_type in MODELS.config_types().values()
        for model_type in config_type.huggingface_types
    }
    model_type = found.get("model_type")
    config_type = by_type.get(str(model_type))
    if config_type is None:
        supported = ", ".join(map(repr, sorted(by_type)))
        raise ConfigError(f"{file}: model_type = {model_type!r}: expected one of {supported}")
    try:
        keys = config_type.keys_from_huggingface(found)
        config = config_type.model_validate(keys)
    except (ValidationError, ConfigError) as error:
        raise ConfigError(f"{file}: {mistakes_in(error)}") from error
    return {"name": config.name, **keys}


def check_model_folder(config: ModelConfig, path: Path) -> None:
    """Checks a model against the config.json next to its weights, if there is one.

    Args:
        path: a folder, an adapter's too, or a file with weights.

    Raises:
        CheckpointError: if it describes another model; names the keys of `[model]` that differ.
    """
    folder = folder_of_model(path) if path.is_dir() else path.parent
    if not (folder / CONFIG_NAME).is_file():
        return
    try:
        theirs = MODELS.restore(read_model_folder(folder)).architecture()
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    ours = config.architecture()
    differing = "; ".join(
        f"{key} = {theirs.get(key)!r}, [model] has {ours.get(key)!r}"
        for key in ours | theirs
        if theirs.get(key) != ours.get(key)
    )
    if differing:
        raise CheckpointError(
            f"{folder / CONFIG_NAME} describes another model: {differing}. Change [model] to match."
        )

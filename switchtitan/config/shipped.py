"""The configurations that are installed with the package: `train_configs/` of the checkout, linked into the package."""

import os
import sys
from importlib import resources
from pathlib import Path

FOLDER = Path(str(resources.files("switchtitan"))) / "train_configs"
QUICKSTART = FOLDER / "llama_quickstart_switchlora.toml"
"""What is trained if no configuration is given."""


def find_config(given: str | Path) -> Path:
    """The file that a user means: `given`, or if there is no such file, the configuration of that name in `FOLDER`.

    `llama_350m_switchlora.toml` and `train_configs/llama_350m_switchlora.toml` both name that configuration from anywhere.
    Says on standard error which file was taken, except in the ranks that a launcher started.
    """
    path = Path(given)
    if path.exists() or path.is_absolute():
        return path
    for shipped in (FOLDER / path, FOLDER.parent / path):
        if shipped.suffix == ".toml" and shipped.is_file():
            if "RANK" not in os.environ:
                print(
                    f"{path}: using {shipped}, which is installed with switchtitan", file=sys.stderr
                )
            return shipped
    return path

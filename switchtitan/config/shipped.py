"""The configurations that are installed with the package, from the checkout's `train_configs/`."""

import os
import sys
from importlib import resources
from pathlib import Path

from switchtitan.files import exists

FOLDER = Path(str(resources.files("switchtitan"))) / "train_configs"
QUICKSTART = FOLDER / "llama_quickstart_switchlora.toml"
"""The configuration that is used if none is given."""


def find_config(given: str | Path) -> Path:
    """Return `given` if it exists, else the configuration of that name in `FOLDER`.

    `llama_350m_switchlora.toml` and `train_configs/llama_350m_switchlora.toml` work in any working
    directory. Prints on stderr that a file in `FOLDER` is used, except in a launcher's ranks.
    """
    path = Path(given)
    if exists(path) or path.is_absolute():
        return path
    for shipped in (FOLDER / path, FOLDER.parent / path):
        if shipped.suffix == ".toml" and exists(shipped) and shipped.is_file():
            if not os.environ.get("RANK"):
                print(
                    f"{path}: using {shipped}, which is installed with switchtitan", file=sys.stderr
                )
            return shipped
    return path

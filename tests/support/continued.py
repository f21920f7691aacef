"""A tiny run that continues a model from a folder in Hugging Face's layout."""

import os
import re
from pathlib import Path

from support.tiny import METHOD_KEYS, TINY


def write_continued_config(home: Path, model_folder: Path, method: str = "switchlora") -> Path:
    """Writes the configuration of a tiny run in `home` that trains the model of a folder."""
    home.mkdir(parents=True, exist_ok=True)
    text = TINY.format(folder=home, method=method, method_keys=METHOD_KEYS[method])
    model = f"[model]\nfrom_folder = '{model_folder}'\n"
    text = re.sub(r"\[model\].*(?=\[method\])", model, text, flags=re.DOTALL)
    text = text.replace("[checkpoint]\n", f"[checkpoint]\ninitial_weights = '{model_folder}'\n")
    file = home / f"{method}-{os.getpid()}.toml"
    file.write_text(text)
    return file

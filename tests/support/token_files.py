"""Files of token ids, in the layout that nanoGPT writes."""

from pathlib import Path

import numpy as np


def write_nanogpt(
    file: Path, documents: list[list[int]], eos_id: int, dtype: str = "uint16"
) -> None:
    """Writes tokens without a header."""
    file.parent.mkdir(parents=True, exist_ok=True)
    flat = [token for ids in documents for token in (*ids, eos_id)]
    file.write_bytes(np.array(flat, dtype=dtype).tobytes())

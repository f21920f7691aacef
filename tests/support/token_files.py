"""Files of token ids, in the layouts that other programs write."""

import struct
from pathlib import Path

import numpy as np


def write_nanogpt(
    file: Path, documents: list[list[int]], eos_id: int, dtype: str = "uint16"
) -> None:
    """Writes tokens without a header."""
    file.parent.mkdir(parents=True, exist_ok=True)
    flat = [token for ids in documents for token in (*ids, eos_id)]
    file.write_bytes(np.array(flat, dtype=dtype).tobytes())


def write_megatron(prefix: Path, documents: list[list[int]], eos_id: int, code: int = 8) -> None:
    """Writes NAME.idx and NAME.bin; each second document has two sequences."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype({4: "<i4", 8: "<u2"}[code])
    sequences: list[list[int]] = []
    borders = [0]
    for number, ids in enumerate(documents):
        cut = len(ids) // 2
        sequences += [ids[:cut], [*ids[cut:], eos_id]] if number % 2 else [[*ids, eos_id]]
        borders.append(len(sequences))
    lengths = np.array([len(ids) for ids in sequences], dtype="<i4")
    offsets = (np.cumsum(lengths, dtype="<i8") - lengths) * dtype.itemsize
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(sequences), len(borders))
    parts = [lengths, offsets.astype("<i8"), np.array(borders, dtype="<i8")]
    prefix.with_suffix(".idx").write_bytes(header + b"".join(part.tobytes() for part in parts))
    flat = np.array([token for ids in sequences for token in ids], dtype=dtype)
    prefix.with_suffix(".bin").write_bytes(flat.tobytes())

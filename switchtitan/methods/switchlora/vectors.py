"""The vectors of all layers' factors: rows of A [rank, in] and of B [rank, out], which are treated alike."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from switchtitan.distributed.host_copies import to_device

FACTOR_A, FACTOR_B = FACTORS = 0, 1
"""Places of A and of B in tables [2, layers, rank]; vector i of one is the counterpart of vector i of the other."""


class VectorSpan(NamedTuple):
    """Neighbouring vectors of one factor of one layer."""

    factor: int
    layer: int
    vectors: range


def fill_vectors_(table: Tensor, spans: list[VectorSpan], value: int) -> None:
    """Sets the entries of these vectors in a table [2, layers, rank]; one copy and one kernel, however many they are."""
    if spans:
        mask = np.zeros(table.shape, dtype=np.bool_)
        for factor, layer, vectors in spans:
            mask[factor, layer, vectors.start : vectors.stop] = True
        table.masked_fill_(to_device(torch.from_numpy(mask), table.device), value)

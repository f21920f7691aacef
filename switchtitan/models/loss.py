"""The training loss."""

import torch.nn.functional as F
from torch import Tensor

from switchtitan.contracts import IGNORED_TARGET


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum over all targets of -log p(target), in nats, computed in fp32; 0-dim.

    Args:
        logits: [batch, seq, vocabulary].
        targets: [batch, seq]; `IGNORED_TARGET` does not count.
    """
    return F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum"
    )

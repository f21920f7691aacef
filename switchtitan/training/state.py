"""The state of a run, besides tensors."""

from dataclasses import dataclass


@dataclass
class TrainState:
    """The state that a run resumes from, besides tensors."""

    step: int = 0
    """Optimizer steps done."""
    num_skipped: int = 0
    """Batches whose update was skipped. Their tokens count as seen."""
    tokens_seen: int = 0
    first_validation_loss: float | None = None
    last_validation_loss: float | None = None
    initial_weights: str | None = None
    """File or checkpoint of a warm start's weights."""
    initial_fingerprint: str | None = None
    """Checksum of those weights."""

    @property
    def num_batches(self) -> int:
        """Number of global batches read: the position in the data."""
        return self.step + self.num_skipped

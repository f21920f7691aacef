"""What a run resumes from, besides tensors."""

from dataclasses import dataclass


@dataclass
class TrainState:
    """What a run resumes from, besides tensors."""

    step: int = 0
    """Optimizer steps done."""
    num_skipped: int = 0
    """Batches whose update was skipped; they count as read."""
    tokens_seen: int = 0
    first_validation_loss: float | None = None
    last_validation_loss: float | None = None
    initial_weights: str | None = None
    """What a warm start read."""
    initial_fingerprint: str | None = None
    """A checksum of it."""

    @property
    def num_batches(self) -> int:
        """Global batches read, the position in the data."""
        return self.step + self.num_skipped

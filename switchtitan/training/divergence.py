"""The error that ends a run whose numbers are no longer usable."""

from switchtitan.checkpoint import Checkpointer
from switchtitan.errors import UserError


class TrainingDivergedError(UserError):
    """Losses, gradients or weights are no longer finite."""

    exit_status = 3
    """Tells calling programs that the configuration was valid."""


def divergence(reason: str, advice: str, checkpointer: Checkpointer) -> TrainingDivergedError:
    """Returns the error to raise; names the last checkpoint, which is from before.

    Collective: waits for a save in progress.
    """
    checkpointer.finish()
    checkpoint = checkpointer.resume_point
    last_good = (
        "there is no checkpoint yet"
        if checkpoint is None
        else f"the last good checkpoint is {checkpoint}"
    )
    return TrainingDivergedError(f"{reason}; {last_good}; {advice}")

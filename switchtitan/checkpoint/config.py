"""The `[checkpoint]` section."""

import os
from typing import Annotated

from pydantic import AfterValidator, Field

from switchtitan.registry import Section

RESUME_AUTO = "auto"
RESUME_NEVER = "never"
_GivenPath = Annotated[str, AfterValidator(os.path.expanduser)]


class CheckpointConfig(Section):
    """When to save, how many checkpoints to keep, and what to resume or start from."""

    interval: int = Field(default=1000, ge=1)
    """Optimizer steps between two checkpoints, at least 1; the last step is always saved."""
    keep_latest: int = Field(default=2, ge=0)
    """How many of this run's newest checkpoints to keep; 0 keeps all."""
    keep_every: int | None = Field(default=None, ge=1)
    """Also keep checkpoints whose step is a multiple of this, at least 1; default: none."""
    resume: _GivenPath = Field(default=RESUME_AUTO, min_length=1)
    """What to resume from. "auto": the newest complete checkpoint in the output folder, if any.
    "never": start from scratch; an error if the output folder holds checkpoints. Otherwise the path
    of a checkpoint or a run; once this run has saved, the same path resumes its own newest."""
    async_save: bool = True
    """Write in the background during training; takes one more copy of what a rank writes in host
    memory, page-locked on CUDA, from the first save on."""
    grace_s: int = Field(default=300, ge=1)
    """Seconds, at least 1, between a signal that stops the run and the end of its last save. A save
    that takes longer is abandoned, and the run resumes from the checkpoint before. `switchtitan
    launch` kills ranks that have not ended some seconds later. Set it to what your cluster allows
    between the signal and SIGKILL."""
    initial_weights: _GivenPath | None = None
    """Dense weights that a new run starts from: a folder in Hugging Face's layout with safetensors
    files, a folder with a PEFT adapter, a safetensors file, or a checkpoint or run of any
    method."""

    @property
    def resume_path(self) -> str | None:
        """The checkpoint or run that `resume` names, as an absolute path without links."""
        return None if self.resume in (RESUME_AUTO, RESUME_NEVER) else os.path.realpath(self.resume)

    def without_effect(self) -> list[str]:
        """See `registry.Section`."""
        void = []
        if self.initial_weights is not None and self.resume not in (RESUME_AUTO, RESUME_NEVER):
            void.append(
                f"initial_weights = {self.initial_weights!r} has no effect, since resume = "
                f"{self.resume!r} restores all weights"
            )
        if self.keep_every is not None and self.keep_latest == 0:
            void.append(f"keep_every = {self.keep_every} has no effect with keep_latest = 0")
        return void

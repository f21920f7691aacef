"""The `[checkpoint]` section."""

from pydantic import Field, model_validator

from switchtitan.config.section import Section

RESUME_AUTO = "auto"
RESUME_NEVER = "never"


class CheckpointConfig(Section):
    """When to save, what to keep, and what to start from."""

    interval: int = Field(default=1000, ge=1)
    """Optimizer steps between two checkpoints, at least 1; the last step is always saved."""

    keep_latest: int = Field(default=2, ge=0)
    """How many of this run's newest checkpoints to keep; 0 keeps them all."""

    resume: str = Field(default=RESUME_AUTO, min_length=1)
    """What to resume from. "auto": the newest complete checkpoint in the output folder, if there is one. "never":
    start from scratch, and refuse an output folder that holds checkpoints. Else the path of a checkpoint or a run."""

    async_save: bool = True
    """Write in the background while training goes on; costs one more copy of the state in host memory, from the first
    save on."""

    initial_weights: str | None = None
    """Dense weights that a new run starts from: a folder in Hugging Face's layout with safetensors files, a safetensors file, a
    folder `model_<step>` of SwitchLoRA's original implementation, or a checkpoint or run of any method."""

    @model_validator(mode="after")
    def _initial_weights_must_matter(self) -> "CheckpointConfig":
        if self.initial_weights is not None and self.resume not in (RESUME_AUTO, RESUME_NEVER):
            raise ValueError(
                f"initial_weights = {self.initial_weights!r} would have no effect, because "
                f"resume = {self.resume!r} restores all weights; "
                'remove one of the two, or set resume = "auto"'
            )
        return self

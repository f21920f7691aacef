"""Sections that configure the run as a whole rather than one part of it."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from switchtitan.config.section import Section


class RunConfig(Section):
    """`[job]`: what the run is called, where it writes, and its seed."""

    name: str = Field(min_length=1)
    """What the run is called in logs and in TensorBoard."""
    output_dir: Path
    """Folder for checkpoints, logs and traces, relative to where the run is started; made if missing."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Fixes initial weights, order of the data and dropout; an integer >= 0."""


class TrainingConfig(Section):
    """`[training]`: how long and on how many sequences at a time to train."""

    steps: int = Field(ge=1)
    """Optimizer steps of the whole run, a resumed run's earlier ones included; >= 1."""
    global_batch_size: int = Field(ge=1)
    """Sequences per optimizer step over all ranks; a multiple of ranks x local_batch_size."""
    local_batch_size: int = Field(ge=1)
    """Sequences per rank and micro-step: what the memory holds. Gradients are summed over micro-steps."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm, > 0; "none" leaves them alone."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations and gradients; weights that train and optimizer state are float32 always."""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights that do not train; a run keeps to one. In bfloat16 what is added to them is rounded up or down at random,
    right in the mean, yet 500 such changes of a weight moved it by 6 % of its norm: for methods that change frozen weights
    rarely or never. Takes a method that freezes weights."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a step with a gradient that is inf or nan does: stop the run, or skip the update."""


class EvaluationConfig(Section):
    """`[evaluation]`: loss on held-out sequences."""

    interval: int = Field(default=1000, ge=1)
    """Optimizer steps between evaluations; >= 1. The first and the last step are evaluated too, unless the whole run is
    shorter than that."""
    tokens: int = Field(default=10_000_000, ge=1)
    """Held-out tokens per evaluation, rounded down to whole sequences; at least data.seq_len."""
    test_tokens: int | None = Field(default=None, ge=1)
    """Tokens of the test split on which the trained model is evaluated once, after the last step, rounded down to whole
    sequences; at least data.seq_len. No such evaluation unless set, which needs data.test_fraction."""

"""The section `[metrics]`."""

from typing import Literal

from pydantic import Field

from switchtitan.registry import Section


class MetricsConfig(Section):
    """Metrics to report, how often and where."""

    interval: int = Field(default=10, ge=1)
    """Optimizer steps between two reports, at least 1. A report makes the host wait for the
    device."""

    tensorboard: bool = True
    """Write scalars and histograms to `<output_dir>/tensorboard`."""

    trackers: tuple[Literal["wandb", "trackio"], ...] = ()
    """Experiment trackers that the scalars are also sent to, as one run each: Weights & Biases,
    Trackio. Their packages are extras, e.g. `pip install 'switchtitan[wandb]'`; their own variables
    configure them, e.g. `WANDB_MODE=offline`."""

    progress_bar: bool = True
    """Draw a progress bar if standard error is a terminal."""

    region_times: bool = True
    """Report how long a step spends in each region (data, forward, backward, reduce, clip, switch,
    update), and an evaluation and a save. On a GPU: the device's time, read without waiting."""

    layers: bool = False
    """Report norms of each layer's gradient and update, and the share of its frozen weight that the
    step's merge changed. Reported steps take a copy of the local shards of all weights."""

    communication: bool = False
    """Count the bytes that each rank sends in the third step of the run, which makes that step
    slower. Requires several ranks and at least three steps."""

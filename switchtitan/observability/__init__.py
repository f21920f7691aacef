"""What a run writes for users: log, console table, TensorBoard, speed, memory, traces."""

from typing import Any

TENSORBOARD_FOLDER = "tensorboard"
"""Folder of event files and traces in a run's output folder."""
RESULTS_FILE = "results.json"
"""Machine-readable results of a finished run: final losses, speed, memory and environment."""
PLOT_STYLE: Any = {
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    # The default padding lets titles touch the labels above.
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.w_pad": 0.1,
}
"""matplotlib's parameters for all pictures."""

"""What a run writes for users: log, console table, TensorBoard, speed, memory, traces."""

TENSORBOARD_FOLDER = "tensorboard"
"""Folder of event files and traces in a run's output folder."""
RESULTS_FILE = "results.json"
"""Machine-readable results of a finished run: final losses, speed, memory and environment."""

"""A training run: its steps, evaluations, reports and saves, and its output folder."""

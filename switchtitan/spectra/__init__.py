"""Rank telemetry: singular values of what training changed, while training and from checkpoints."""

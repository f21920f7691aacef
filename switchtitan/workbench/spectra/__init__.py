"""Rank telemetry: singular values of the weights' change, during training and from checkpoints."""

"""Costs of a training step: times of several configurations side by side, and estimates of
communication, memory and FLOPs without the hardware."""

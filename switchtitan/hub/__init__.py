"""Weights from and to other projects: Hugging Face's layout and the original implementation's checkpoints."""

"""Import and export weights: Hugging Face's layout, the original implementation's checkpoints."""

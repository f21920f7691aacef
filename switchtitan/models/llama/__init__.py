"""LLaMA and its family."""

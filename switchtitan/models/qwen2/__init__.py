"""Qwen2: LLaMA's parts with biases in the query, key and value projections."""

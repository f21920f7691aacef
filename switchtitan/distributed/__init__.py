"""Ranks, shards, activation checkpointing and compilation, all applied to a model from outside."""

"""Ranks, shards, activation checkpointing and compilation: everything that acts on a model from outside."""

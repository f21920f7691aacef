"""Atomic checkpoints: save, find, verify, load on any number of ranks, prune."""

"""Corpora: from a source's documents to the batches of a training step."""

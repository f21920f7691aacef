"""The configuration of a run: all sections, and the checks between them."""

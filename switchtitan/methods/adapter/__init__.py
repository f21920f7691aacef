"""Layers with low-rank factors, and the base classes of the methods that train them."""

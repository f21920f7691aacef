"""Adapters: layers W + s B A with a frozen W, and the base classes of methods that train them."""

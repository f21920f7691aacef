"""Geometry of trained weights: spectra, sharpness, barriers, activations (after arXiv 2605.13652).

The quantities are those of "Beyond Perplexity: A Geometric and Spectral Study of Low-Rank
Pre-Training". The definitions are our own; each function states its own.
"""

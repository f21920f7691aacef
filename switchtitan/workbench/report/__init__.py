"""Curves and results of runs, as a picture or as one HTML page."""

"""Reports of runs and of comparisons as one HTML file that needs no server and no network."""

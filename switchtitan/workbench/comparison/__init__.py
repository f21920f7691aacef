"""Fair comparisons of methods: a declared grid of runs, their training, statistics and plots."""

"""Fair comparisons of methods: a declared grid of runs, its execution, its statistics and its pictures."""

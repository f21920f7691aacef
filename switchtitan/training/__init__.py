"""One training run: the step, when to evaluate, report and save, and the folder that it writes."""

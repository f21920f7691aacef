"""The commands of the console script `switchtitan`, one module each."""

"""The commands of the console script `switchtitan`, one module each; `main.py` finds them."""

"""`switchtitan plot run`, from a checkout."""

import sys

from switchtitan.cli.main import run

if __name__ == "__main__":
    run(["plot", "run", *sys.argv[1:]])

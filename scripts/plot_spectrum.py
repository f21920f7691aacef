"""`switchtitan plot spectrum`, from a checkout."""

import sys

from switchtitan.cli.main import run

if __name__ == "__main__":
    run(["plot", "spectrum", *sys.argv[1:]])

"""`switchtitan export`, from a checkout."""

import sys

from switchtitan.cli.main import run

if __name__ == "__main__":
    run(["export", *sys.argv[1:]])

"""`switchtitan prepare`, from a checkout."""

import sys

from switchtitan.cli.main import run

if __name__ == "__main__":
    run(["prepare", *sys.argv[1:]])

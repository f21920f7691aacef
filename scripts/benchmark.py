"""`switchtitan benchmark`, from a checkout."""

import sys

from switchtitan.cli.main import run

if __name__ == "__main__":
    run(["benchmark", *sys.argv[1:]])

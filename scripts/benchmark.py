"""`switchtitan benchmark`, from a checkout."""

import sys

from switchtitan.cli.benchmark import main

if __name__ == "__main__":
    main(sys.argv[1:])

"""`switchtitan estimate`, from a checkout."""

import sys

from switchtitan.cli.estimate import main

if __name__ == "__main__":
    main(sys.argv[1:])

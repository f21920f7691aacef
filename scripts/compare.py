"""`switchtitan compare`, from a checkout."""

import sys

from switchtitan.cli.compare import main

if __name__ == "__main__":
    main(sys.argv[1:])

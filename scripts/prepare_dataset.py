"""`switchtitan prepare`, from a checkout."""

import sys

from switchtitan.cli.prepare import main

if __name__ == "__main__":
    main(sys.argv[1:])

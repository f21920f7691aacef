"""`switchtitan export`, from a checkout."""

import sys

from switchtitan.cli.export import main

if __name__ == "__main__":
    main(sys.argv[1:])

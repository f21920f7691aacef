"""`switchtitan plot spectrum`, from a checkout."""

import sys

from switchtitan.cli.plot_spectrum import main

if __name__ == "__main__":
    main(sys.argv[1:])

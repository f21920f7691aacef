"""`switchtitan plot run`, from a checkout."""

import sys

from switchtitan.cli.plot_run import main

if __name__ == "__main__":
    main(sys.argv[1:])

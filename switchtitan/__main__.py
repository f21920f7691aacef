"""Makes `python -m switchtitan` run the console script `switchtitan`."""

from switchtitan.cli.main import main

if __name__ == "__main__":
    main()

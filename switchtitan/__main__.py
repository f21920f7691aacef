"""Makes `python -m switchtitan` run the console script `switchtitan`."""

from switchtitan.cli.main import run

if __name__ == "__main__":
    run()

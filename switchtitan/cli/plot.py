"""Draws runs: `switchtitan plot run RUN ... --output FILE`, `switchtitan plot spectrum RUN ... --output FILE`."""

from collections.abc import Sequence

from switchtitan.cli.main import help_text, run_command

PICTURES = {
    "run": "Losses, learning rate and switches of one or more runs.",
    "spectrum": "The rank of the change of the weights since step 0, for runs next to each other.",
}
"""Picture -> its line in `switchtitan plot --help`. The module `switchtitan.cli.plot_<picture>` has its `main(argv)`."""


def main(argv: Sequence[str]) -> None:
    """Draws what the command line asks for."""
    picture, *arguments = argv or ["--help"]
    if picture in ("-h", "--help"):
        print(help_text("switchtitan plot", PICTURES))
    else:
        run_command("switchtitan plot", picture, PICTURES, arguments, "switchtitan.cli.plot_{}")

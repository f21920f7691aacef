"""Draws runs: `switchtitan plot spectrum RUN ... --output FILE`."""

from collections.abc import Sequence

from switchtitan.cli.main import help_text, run_command

PICTURES = {
    "spectrum": "The rank of the weights' change since step 0, for one or more runs.",
}
"""Picture -> its line in `switchtitan plot --help`. Its module is
`switchtitan.cli.plot_<picture>`."""


def main(argv: Sequence[str]) -> None:
    """Draws the chosen picture."""
    picture, *arguments = argv or ["--help"]
    if picture in ("-h", "--help"):
        print(help_text("switchtitan plot", PICTURES))
    else:
        run_command("switchtitan plot", picture, PICTURES, arguments, "switchtitan.cli.plot_{}")

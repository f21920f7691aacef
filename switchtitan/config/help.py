"""The text of `--help`: every key of a configuration with its value and its sentence."""

import tyro

from switchtitan.config.section import Section


def print_help(config: Section, program: str, introduction: str) -> None:
    """Prints every key of `config`, with its present value as the default, on standard output.

    Args:
        config: the sections put together; each section's own class decides which keys it has.
        program: the command that the user gave.
        introduction: what stands above the keys.
    """
    print(introduction)
    try:
        tyro.cli(
            type(config),
            args=["--help"],
            default=config,
            prog=program,
            description="",
            use_underscores=True,
            # A key always takes a value (`--compile.blocks false`), and unions are no subcommands.
            config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
        )
    except SystemExit:
        return

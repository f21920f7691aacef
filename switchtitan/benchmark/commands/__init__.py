"""The subcommands of scripts/benchmark.py, one module each; a new one is a module and a row here."""

from switchtitan.benchmark.commands.checkpoint import CHECKPOINT
from switchtitan.benchmark.commands.command import Command, Measurement, Overrides
from switchtitan.benchmark.commands.communication import COMMUNICATION
from switchtitan.benchmark.commands.layer import LAYER
from switchtitan.benchmark.commands.loader import LOADER
from switchtitan.benchmark.commands.loss import LOSS
from switchtitan.benchmark.commands.optimizer import OPTIMIZER
from switchtitan.benchmark.commands.startup import STARTUP
from switchtitan.benchmark.commands.step import STEP
from switchtitan.benchmark.commands.switch import SWITCH

COMMANDS: tuple[Command, ...] = (
    STEP,
    COMMUNICATION,
    LAYER,
    LOSS,
    OPTIMIZER,
    LOADER,
    CHECKPOINT,
    STARTUP,
    SWITCH,
)
"""In the order of the program's help."""

__all__ = ["COMMANDS", "Command", "Measurement", "Overrides"]

"""The subcommands of `switchtitan benchmark`. To add one, add a module and a row here."""

from switchtitan.benchmark.commands.command import Command, Measurement, Overrides
from switchtitan.benchmark.commands.count_communication import COMMUNICATION
from switchtitan.benchmark.commands.time_checkpoint import CHECKPOINT
from switchtitan.benchmark.commands.time_layer import LAYER
from switchtitan.benchmark.commands.time_loader import LOADER
from switchtitan.benchmark.commands.time_loss import LOSS
from switchtitan.benchmark.commands.time_startup import STARTUP
from switchtitan.benchmark.commands.time_step import STEP
from switchtitan.benchmark.commands.time_switch import SWITCH

COMMANDS: tuple[Command, ...] = (
    STEP,
    COMMUNICATION,
    LAYER,
    LOSS,
    LOADER,
    CHECKPOINT,
    STARTUP,
    SWITCH,
)
"""In the order of `--help`."""

__all__ = ["COMMANDS", "Command", "Measurement", "Overrides"]

"""`switchtitan train --dry-run`: says what would be trained, and writes nothing."""

import logging
import os
from collections.abc import Sequence

from switchtitan.benchmark.data_plan import SourcePlan
from switchtitan.benchmark.run_plan import RunPlan, plan_run
from switchtitan.distributed.launcher import num_ranks_from_launcher
from switchtitan.errors import UserError, exit_for
from switchtitan.files import format_bytes
from switchtitan.job.config import parse_arguments
from switchtitan.observability import configure_logging
from switchtitan.observability.console import format_count, format_duration
from switchtitan.progress import slow_note

ASSUMED_MFU = 0.4
"""Share of the device's peak for the stated time; an assumption, not a measurement."""

_INDENT = " " * 14


def main(argv: Sequence[str], num_ranks: int | None = None) -> None:
    """Prints what the command would train.

    Args:
        argv: the arguments of `train`.
        num_ranks: by default those that a launcher started; only the first one prints.

    Raises:
        SystemExit: with status 2 for a mistake that training would refuse.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        num_ranks = num_ranks or num_ranks_from_launcher()
        config = parse_arguments(argv, num_ranks)
        configure_logging(is_main=True)
        # What is found is printed below.
        logging.getLogger("switchtitan").setLevel(logging.WARNING)
        with slow_note("estimating: each operation of a few steps runs on tensors without values"):
            plan = plan_run(config, num_ranks)
        print("\n".join(describe(plan)))
    except UserError as error:
        exit_for(error)


def describe(plan: RunPlan) -> list[str]:
    """Returns the lines to print."""
    rows = [
        ("run", [f"{plan.config.job.name} (dry run: nothing is trained or written)"]),
        ("start", _start(plan)),
        ("parameters", [_parameters(plan)]),
        ("data", _data(plan)),
        ("steps", _steps(plan)),
        ("devices", [f"{plan.num_ranks} x {plan.device}, compute dtype {plan.compute_dtype}"]),
        ("memory", _memory(plan)),
        ("disk", _disk(plan)),
        ("operations", _operations(plan)),
    ]
    return [
        f"{name if number == 0 else '':<{len(_INDENT)}}{line}"
        for name, lines in rows
        for number, line in enumerate(lines)
    ]


def _start(plan: RunPlan) -> list[str]:
    start, total = plan.start, plan.config.training.steps
    if start.checkpoint is None:
        weights = plan.config.checkpoint.initial_weights
        new = f"a new run in {plan.config.job.output_dir}"
        return [new] if weights is None else [new, f"initial weights: {weights} (not read)"]
    lines = [f"would resume from {start.checkpoint}: step {start.state.step} of {total}"]
    if start.changes:
        lines.append(f"changed since that checkpoint: {'; '.join(start.changes)}")
    return lines


def _parameters(plan: RunPlan) -> str:
    return ", ".join(f"{number:,} {kind}" for kind, number in plan.parameters.items() if number)


def _data(plan: RunPlan) -> list[str]:
    return [line for source in plan.data.sources for line in _source(source)]


def _source(source: SourcePlan) -> list[str]:
    share = "" if source.share is None else f"{source.share:.2%} "
    lines = [share + source.description]
    if source.fallback_for is not None:
        lines.append(f"FALLBACK for {source.fallback_for}")
    if source.folder is None:
        return [*lines, "not prepared: would be prepared with the first source's tokenizer"]
    if source.corpus is None:
        return [*lines, f"not prepared: would be prepared in {source.folder}"]
    num_tokens = source.corpus.index.num_tokens("train")
    return [*lines, f"prepared in {source.folder}: {num_tokens:,} tokens to train on"]


def _steps(plan: RunPlan) -> list[str]:
    if plan.num_steps == 0:
        return ["none to come: the run has finished; increase [training] steps to train longer"]
    num_tokens = plan.num_steps * plan.tokens_per_step
    epochs = plan.data.epochs(num_tokens)
    passes = ""
    if epochs is not None:
        split = "split" if len(epochs) == 1 else "splits"
        passes = f", {' and '.join(f'{n:.3g}' for n in epochs)} passes over the training {split}"
    return [
        f"{plan.num_steps:,} of {plan.tokens_per_step:,} tokens: "
        f"{format_count(num_tokens)} tokens{passes}"
    ]


def _memory(plan: RunPlan) -> list[str]:
    memory = plan.step.memory
    return [
        f"{format_bytes(memory.peak)} on each rank at the peak of a step, estimated; of it",
        f"{format_bytes(memory.state)} for weights, gradients and optimizer",
    ]


def _disk(plan: RunPlan) -> list[str]:
    disk = plan.disk
    needed = disk.num_more_at_most * disk.checkpoint_bytes
    return [
        f"{format_bytes(disk.checkpoint_bytes)} for a checkpoint, saved {disk.num_saves} times",
        f"{format_bytes(needed)} more at most, {format_bytes(disk.free_bytes)} free",
    ]


def _operations(plan: RunPlan) -> list[str]:
    lines = [
        f"{plan.flops:.3g} floating-point operations, {plan.step.flops_ratio:.2f} of full rank's"
    ]
    duration_s = plan.duration_s(ASSUMED_MFU)
    if duration_s is None:
        return [*lines, f"time: the peak of {plan.device} is not known"]
    return [*lines, f"time at an MFU of {ASSUMED_MFU:.0%}: {format_duration(duration_s)}"]

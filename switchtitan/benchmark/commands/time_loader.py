"""`switchtitan benchmark loader`: speed of reading batches, compared with training."""

import argparse
import time

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from switchtitan.benchmark.commands.command import (
    Command,
    Measurement,
    Overrides,
    add_config,
    add_rounds,
)
from switchtitan.benchmark.side_by_side import time_steps_side_by_side
from switchtitan.benchmark.sides import load_sides
from switchtitan.benchmark.tables import aligned
from switchtitan.config.command_line import positive_int
from switchtitan.data import build_train_batches, open_corpus
from switchtitan.job.config import JobConfig
from switchtitan.observability.console import format_count


def tokens_read_per_s(config: JobConfig, rounds: int, steps_per_round: int) -> NDArray[np.float64]:
    """Returns tokens per second that one process reads of the global batch, [rounds].

    Skips the first batches, during which worker processes start, and those that they prefetch.
    """
    sequences = open_corpus(config.data).train_split(config.data.seq_len)
    training = config.training
    batches = build_train_batches(
        sequences,
        seed=config.job.seed,
        global_batch_size=training.global_batch_size,
        local_batch_size=training.local_batch_size,
        rank=0,
        num_ranks=1,
        num_workers=config.data.num_workers,
    )
    num_ahead = 2 * config.data.num_workers * training.local_batch_size
    try:
        for _ in range(1 + -(-num_ahead // training.global_batch_size)):
            next(batches)
        elapsed_s = np.empty(rounds)
        for index in range(rounds):
            began_at = time.perf_counter()
            for _ in range(steps_per_round):
                next(batches)
            elapsed_s[index] = time.perf_counter() - began_at
    finally:
        batches.close()
    return steps_per_round * training.global_batch_size * config.data.seq_len / elapsed_s


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--training-tokens-per-s",
        type=positive_int,
        help="speed of training (default: measured in two rounds of three steps)",
    )
    add_rounds(parser, rounds=5, per_round=20, unit="calls", meaning="global batches")


def _measure(options: argparse.Namespace, overrides: Overrides) -> Measurement:
    ((name, config),) = load_sides([options.config], overrides, num_ranks=1).items()
    read = tokens_read_per_s(config, options.rounds, options.calls_per_round)
    consumed = options.training_tokens_per_s
    if consumed is None:
        consumed = time_steps_side_by_side({name: config}, rounds=2, steps_per_round=3)[
            name
        ].tokens_per_s
    median = float(np.median(read))
    rows = [
        ("tokens/s", "lowest-highest", "ratio", ""),
        (
            format_count(median),
            f"{format_count(read.min())}-{format_count(read.max())}",
            f"{median / consumed:.1f}",
            f"read by {config.data.num_workers} workers",
        ),
        (format_count(consumed), "", "1", "trained on"),
    ]
    record: dict[str, JsonValue] = {
        "tokens_read_per_s": median,
        "round_tokens_read_per_s": read.tolist(),
        "training_tokens_per_s": consumed,
        "training_was_measured": options.training_tokens_per_s is None,
        "ratio": median / consumed,
        "num_workers": config.data.num_workers,
    }
    return Measurement(aligned(rows), record)


LOADER = Command(
    name="loader",
    summary="time the data loader alone, compared with training",
    description="Reads a configuration's global batches with its worker processes and without "
    "training, and compares the tokens per second with those of training.",
    add_arguments=_add_arguments,
    measure=_measure,
)

"""`switchtitan benchmark loss`: loss of a linear head, in chunks and from all logits."""

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor, nn

from switchtitan.benchmark.commands.command import (
    Command,
    Measurement,
    Overrides,
    add_dtype,
)
from switchtitan.benchmark.peak_memory import peak_extra_bytes
from switchtitan.benchmark.step_times import ratio_of_rounds
from switchtitan.benchmark.tables import aligned, call_record, milliseconds, ratio_cells
from switchtitan.benchmark.timing import WARM_UP_CALLS, time_calls_in_turns
from switchtitan.config.command_line import positive_int
from switchtitan.distributed.dtype import dtype_on
from switchtitan.distributed.world import device_type
from switchtitan.models.head import Head
from switchtitan.models.loss import CrossEntropy, summed_cross_entropy

_MIB = 2**20


def loss_sides(
    tokens: int, hidden_size: int, vocabulary: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Returns functions by name that compute the loss and the gradients of hidden states and head.

    All use the same random tokens.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = (
        torch.randn(1, tokens, hidden_size, generator=generator).to(device, dtype).requires_grad_()
    )
    head = Head(hidden_size, vocabulary)
    nn.init.normal_(head.weight, std=0.02, generator=generator)
    head.to(device, dtype)
    targets = torch.randint(vocabulary, (1, tokens), generator=generator).to(device)
    compiled = torch.compile(summed_cross_entropy, fullgraph=True, dynamic=False)

    def from_all_logits(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return loss(head(hidden), targets) / tokens

    def in_chunks(loss: CrossEntropy) -> Tensor:
        return loss(hidden, head, targets, tokens)

    losses: dict[str, Callable[[], Tensor]] = {
        "all logits": partial(from_all_logits, summed_cross_entropy),
        "all logits, compiled": partial(from_all_logits, compiled),
        "chunks": partial(in_chunks, CrossEntropy(compile_regions=False)),
        "chunks, compiled": partial(in_chunks, CrossEntropy(compile_regions=True)),
    }
    return {
        name: partial(_loss_and_gradients, loss, (hidden, head.weight))
        for name, loss in losses.items()
    }


def _loss_and_gradients(
    loss: Callable[[], Tensor], inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    value = loss()
    return value.detach(), *torch.autograd.grad(value, inputs)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens", type=positive_int, default=4096, help="tokens of a micro-batch (default: 4096)"
    )
    parser.add_argument(
        "--hidden",
        type=positive_int,
        default=512,
        help="dimension of the hidden states (default: 512)",
    )
    parser.add_argument(
        "--vocabulary",
        type=positive_int,
        default=32100,
        help="size of the vocabulary (default: 32100)",
    )
    add_dtype(parser, "hidden states and head")
    parser.add_argument(
        "--rounds",
        type=positive_int,
        default=4,
        help="turns of each function; an even number is fair (default: 4)",
    )


def _measure(options: argparse.Namespace, overrides: Overrides) -> Measurement:
    device = torch.device(device_type())
    chosen = dtype_on(device, options.dtype)
    sides = loss_sides(options.tokens, options.hidden, options.vocabulary, chosen.dtype, device)
    times = time_calls_in_turns(sides, device, options.rounds, calls_per_round=1)
    peaks = {name: peak_extra_bytes(call, device) for name, call in sides.items()}
    reference, *_ = sides
    rows = [("ms/call", "ratio", "95 % interval", "peak MiB", "ratio", "")]
    for name, seconds in times.items():
        time_cells = (
            ("1", "")
            if name == reference
            else ratio_cells(ratio_of_rounds(seconds, times[reference]))
        )
        peak_cells = f"{peaks[name] / _MIB:.1f}", f"{peaks[name] / peaks[reference]:.3f}"
        rows.append((milliseconds(float(np.median(seconds))), *time_cells, *peak_cells, name))
    memory: dict[str, JsonValue] = {
        name: {"peak_extra_bytes": peak, "ratio": peak / peaks[reference]}
        for name, peak in peaks.items()
    }
    record: dict[str, JsonValue] = {
        "tokens": options.tokens,
        "hidden": options.hidden,
        "vocabulary": options.vocabulary,
        "dtype": chosen.name,
        "rounds": options.rounds,
        "warm_up_calls": WARM_UP_CALLS,
        "calls": call_record(times),
        "memory": memory,
    }
    return Measurement(aligned(rows), record)


LOSS = Command(
    name="loss",
    summary="time the loss and its gradients in chunks and from all logits, and their peak memory",
    description="Times the loss of a linear head with the gradients of hidden states and head, in "
    "chunks of tokens as in training and from all logits, compiled and eager, in alternation. "
    "Prints the peak memory of each.",
    add_arguments=_add_arguments,
    measure=_measure,
    reads_configs=False,
)

"""`switchtitan benchmark layer`: forward and backward of one linear layer, full rank and low rank
with every contraction."""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import JsonValue
from torch import Tensor

from switchtitan.benchmark.commands.command import (
    Command,
    Measurement,
    Overrides,
    add_dtype,
    add_rounds,
)
from switchtitan.benchmark.step_times import Ratio, ratio_of_rounds
from switchtitan.benchmark.tables import aligned, call_record, milliseconds, ratio_cells
from switchtitan.benchmark.timing import time_calls_in_turns
from switchtitan.config.command_line import positive_int
from switchtitan.distributed.dtype import dtype_on
from switchtitan.distributed.world import device_type
from switchtitan.errors import ConfigError
from switchtitan.methods.lowrank.contraction import BY_NAME, cheapest_contraction, num_flops
from switchtitan.models.llama.config import SIZES, LlamaConfig

_FULL_RANK = "full rank"
_SCALE = 0.5


@dataclass(frozen=True)
class Case:
    """Shape, rank and number of tokens of one layer."""

    out_features: int
    in_features: int
    rank: int
    num_tokens: int

    def flops(self, name: str) -> int:
        """FLOPs of forward and backward, including the gradient of x."""
        if name == _FULL_RANK:
            return 6 * self.out_features * self.in_features * self.num_tokens
        return num_flops(
            BY_NAME[name], self.out_features, self.in_features, self.rank, self.num_tokens
        )

    @property
    def chosen(self) -> str:
        """Name of the contraction that the layer chooses."""
        return cheapest_contraction(
            self.out_features, self.in_features, self.rank, self.num_tokens
        ).__name__

    def __str__(self) -> str:
        return (
            f"[{self.out_features}, {self.in_features}] rank {self.rank}, {self.num_tokens} tokens"
        )


def time_layer(
    case: Case, dtype: torch.dtype, compiled: bool, rounds: int, calls_per_round: int
) -> dict[str, NDArray[np.float64]]:
    """Returns seconds of forward and backward by name, [rounds, calls]; full rank is first."""
    device = torch.device(device_type())
    draw = torch.Generator(device).manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=device).to(dtype).requires_grad_()

    x = tensor(case.num_tokens, case.in_features)
    weight = tensor(case.out_features, case.in_features)
    lora_a, lora_b = tensor(case.rank, case.in_features), tensor(case.rank, case.out_features)
    grad = torch.randn(case.num_tokens, case.out_features, device=device).to(dtype)
    frozen = weight.detach()

    def forward_backward(
        layer: Callable[..., Tensor],
        arguments: tuple[Tensor | float, ...],
        trained: tuple[Tensor, ...],
    ) -> None:
        torch.autograd.grad(layer(*arguments), trained, grad)

    def side(
        function: Callable[..., Tensor],
        arguments: tuple[Tensor | float, ...],
        trained: tuple[Tensor, ...],
    ) -> Callable[[], None]:
        layer = torch.compile(function, fullgraph=True, dynamic=False) if compiled else function
        return lambda: forward_backward(layer, arguments, trained)

    sides = {_FULL_RANK: side(F.linear, (x, weight), (x, weight))} | {
        name: side(contraction, (x, frozen, lora_a, lora_b, _SCALE), (x, lora_a, lora_b))
        for name, contraction in BY_NAME.items()
    }
    return time_calls_in_turns(sides, device, rounds, calls_per_round)


def excess_of_choice(case: Case, times: dict[str, NDArray[np.float64]]) -> tuple[str, Ratio]:
    """Returns the fastest contraction by median, and the chosen one's time relative to it."""
    fastest = min(BY_NAME, key=lambda name: float(np.median(times[name])))
    return fastest, ratio_of_rounds(times[case.chosen], times[fastest])


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    shapes = parser.add_mutually_exclusive_group()
    shapes.add_argument(
        "--model-size",
        choices=tuple(SIZES),
        default="60m",
        help="model whose adapted layers are timed (default: 60m)",
    )
    shapes.add_argument(
        "--shape",
        dest="shapes",
        nargs="+",
        type=_shape,
        metavar="OUTxIN",
        help="shapes of layers, instead of a model's",
    )
    parser.add_argument(
        "--rank",
        dest="ranks",
        nargs="+",
        type=positive_int,
        metavar="RANK",
        help="ranks (default: hidden size / 4)",
    )
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=positive_int,
        default=[256, 2048],
        help="tokens in a micro-batch (default: 256 2048)",
    )
    add_dtype(parser, "activations, weights and gradients")
    parser.add_argument("--compile", action="store_true", help="compile all functions")
    add_rounds(parser, rounds=10, per_round=3, unit="calls")


def _shape(argument: str) -> tuple[int, int]:
    out_features, _, in_features = argument.partition("x")
    return positive_int(out_features), positive_int(in_features)


def _measure(options: argparse.Namespace, overrides: Overrides) -> Measurement:
    cases = _cases(options)
    chosen = dtype_on(torch.device(device_type()), options.dtype)
    table: list[tuple[str, ...]] = [("ms", "ratio", "95 % interval", "FLOPs", "GFLOP/s", "")]
    cost: list[str] = []
    record: dict[str, JsonValue] = {}
    for case in cases:
        # torch.compile limits the number of graphs per function.
        torch.compiler.reset()
        times = time_layer(
            case, chosen.dtype, options.compile, options.rounds, options.calls_per_round
        )
        table += _rows(case, times)
        fastest, excess = excess_of_choice(case, times)
        value, interval = ratio_cells(excess)
        cost.append(
            f"{case}: {case.chosen} is chosen, {fastest} is fastest; ratio {value} ({interval})"
        )
        record[str(case)] = {
            "calls": call_record(times),
            "flops": {name: case.flops(name) for name in times},
            "chosen": case.chosen,
            "fastest": fastest,
            "excess_of_choice": excess.value,
            "excess_of_choice_interval_95": [excess.low, excess.high],
        }
    return Measurement(
        [*aligned(table), *cost],
        {"dtype": chosen.name, "compiled": options.compile, "layers": record},
    )


def _cases(options: argparse.Namespace) -> list[Case]:
    """Returns all combinations of shapes, ranks and numbers of tokens.

    Raises:
        ConfigError: if a rank does not fit a shape.
    """
    model = LlamaConfig(size=options.model_size)
    of_model = {shape for name, shape in model.linear_shapes().items() if name != "lm_head"}
    shapes = options.shapes or sorted(of_model)
    ranks = options.ranks or [min(model.sizes.hidden_size, *map(min, shapes)) // 4]
    for rank, shape in itertools.product(ranks, shapes):
        if not 1 <= rank < min(shape):
            raise ConfigError(
                f"--rank {rank}: expected at least 1 and less than the smaller dimension of "
                f"[{shape[0]}, {shape[1]}]"
            )
    return [
        Case(out_features, in_features, rank, num_tokens)
        for (out_features, in_features), rank, num_tokens in itertools.product(
            shapes, ranks, options.tokens
        )
    ]


def _rows(case: Case, times: dict[str, NDArray[np.float64]]) -> list[tuple[str, ...]]:
    reference = times[_FULL_RANK]
    rows: list[tuple[str, ...]] = []
    for name, seconds in times.items():
        median_s = float(np.median(seconds))
        ratio, interval = (
            ("1", "") if name == _FULL_RANK else ratio_cells(ratio_of_rounds(seconds, reference))
        )
        flops_ratio = f"{case.flops(name) / case.flops(_FULL_RANK):.3f}"
        gflop_per_s = f"{case.flops(name) / median_s / 1e9:.4g}"
        mark = " (chosen)" if name == case.chosen else ""
        rows.append(
            (
                milliseconds(median_s),
                ratio,
                interval,
                flops_ratio,
                gflop_per_s,
                f"{case}: {name}{mark}",
            )
        )
    return rows


LAYER = Command(
    name="layer",
    summary="time one linear layer, full rank and low rank in every contraction",
    description="Times forward and backward of one linear layer in alternation: full rank, and the "
    "contractions of a low-rank layer. FLOPs is the ratio of FLOPs to full rank, a lower bound on "
    "the ratio of times at equal speed of the products. Prints the chosen contraction and its cost "
    "compared with the fastest one.",
    add_arguments=_add_arguments,
    measure=_measure,
    reads_configs=False,
)

"""Checks of whole steps on fake CUDA tensors; each function runs in a new process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from support.fake_cuda import python_api
from support.fake_cuda.cases import CASES, NUM_RANKS, config_of
from support.fake_cuda.checks import kernels_of_switch
from support.fake_cuda.copies import FindBlockingCopies
from support.fake_cuda.races import FindRaces
from support.fake_cuda.reads import FindHostReads
from support.fake_cuda.stepper import fake_cuda_stepper, without_initial_values
from switchtitan.benchmark.steppers import fake_stepper
from switchtitan.distributed.config import CompileConfig
from switchtitan.distributed.count_collectives import CommunicationCounts, CountCommunication
from switchtitan.job.config import parse_arguments
from switchtitan.training.stepper import Stepper


class Observed(NamedTuple):
    """What an observer found in the steps of a case."""

    copies: list[str]
    """Operations between host and device for which the host waits."""
    reads: list[str]
    """Values of the device that the host reads."""
    waits: list[str]
    """Calls that make the host wait for an event, a stream or the device."""
    races: list[str]
    """Accesses to memory that do not wait for each other."""
    collectives: dict[str, list[float]]
    """Kind -> number and bytes that a rank sends."""


def steps_of_rank(
    folder: str, num_steps: dict[str, int], num_steps_on_cpu: dict[str, int], rank_from_end: int
) -> tuple[dict[str, list[Observed]], dict[str, list[dict[str, list[float]]]]]:
    """Returns what `steps_of_cases` and `collectives_on_cpu` return."""
    return (
        steps_of_cases(folder, num_steps, rank_from_end),
        collectives_on_cpu(Path(folder), num_steps_on_cpu, rank_from_end),
    )


def steps_of_cases(
    folder: str, num_steps: dict[str, int], rank_from_end: int
) -> dict[str, list[Observed]]:
    """Returns what is observed in each step of cases, from the second to the last.

    Args:
        num_steps: by the name of a case; includes the first step, which fills caches.
        rank_from_end: 0 for the first rank, -1 for the last.
    """
    observed = {}
    for name, number in num_steps.items():
        with observed_stepper(Path(folder), CASES[name], rank_from_end) as (stepper, races):
            observed[name] = [observe(stepper.step, races) for _ in range(number - 1)]
    return observed


@contextmanager
def observed_stepper(
    folder: Path, settings: list[str], rank_from_end: int
) -> Iterator[tuple[Stepper, FindRaces]]:
    """Yields the stepper of a case after its first step, and what has observed its accesses."""
    rank = rank_from_end % NUM_RANKS
    races = FindRaces()
    with fake_cuda_stepper(config_of(folder, settings), NUM_RANKS, rank) as stepper:
        with FindHostReads(races):
            stepper.step()
        yield stepper, races


def observe(step: Callable[[], object], races: FindRaces) -> Observed:
    """Returns what is observed while `step` runs; `races` has observed what ran before."""
    python_api.host_waits.clear()
    races.found.clear()
    copies, sent = FindBlockingCopies(), CountCommunication()
    with FindHostReads(races, copies, sent) as reads:
        step()
    return Observed(
        copies.found,
        reads.found,
        list(python_api.host_waits),
        list(races.found),
        collectives_in(sent.counts),
    )


def collectives_in(counts: CommunicationCounts) -> dict[str, list[float]]:
    """Returns the number of collectives and the bytes that a rank sends, by kind."""
    return {kind: [count.num_calls, count.bytes_sent] for kind, count in counts.items()}


def kernels_of_file(
    file: str, cases: dict[str, list[str]], num_ranks: int, rank: int
) -> dict[str, dict[str, int]]:
    """Returns the kernels of a step's switch by case and operation; "addmm_" is a layer's fold.

    Args:
        cases: by name, overrides of the configuration in `file`, as on the command line.
    """
    uncompiled = [f"--compile.{key}=false" for key in CompileConfig.model_fields]
    return {
        name: kernels_of_switch(
            parse_arguments(["--config", file, *uncompiled, *settings], num_ranks), num_ranks, rank
        )
        for name, settings in cases.items()
    }


def collectives_on_cpu(
    folder: Path, num_steps: dict[str, int], rank_from_end: int
) -> dict[str, list[dict[str, list[float]]]]:
    """Returns the collectives of cases in each step from the second, on a CPU.

    Arguments are those of `steps_of_cases`.
    """
    collectives = {}
    for name, number in num_steps.items():
        config, rank = config_of(folder, CASES[name]), rank_from_end % NUM_RANKS
        with without_initial_values(), fake_stepper(config, NUM_RANKS, rank) as stepper:
            stepper.step()
            collectives[name] = [_collectives_of(stepper) for _ in range(number - 1)]
    return collectives


def _collectives_of(stepper: Stepper) -> dict[str, list[float]]:
    with CountCommunication() as sent:
        stepper.step()
    return collectives_in(sent.counts)

"""Steps of all cases on fake CUDA, and what they may do: documented reads and waits, and the same
collectives as on a CPU."""

from collections.abc import Callable
from pathlib import Path

from support.fake_cuda import cases, step_checks
from support.fake_cuda.process import run_check
from support.fake_cuda.step_checks import Observed

FIRST_RANK, LAST_RANK = 0, -1
"""Both ends of the shards: the last rank has fewer rows, or none."""
Steps = dict[str, list[Observed]]
"""By case: steps 2, 3, ..."""
Collectives = dict[str, list[dict[str, list[float]]]]
"""By case, of steps 2, 3, ...: kind -> number and bytes that a rank sends."""
_DECOMPOSITIONS = {"_linalg_svd", "_linalg_eigh"}
_MOST_STEPS_ON_CPU = 1 + cases.PERIOD


def steps_of(rank: int, folder: Path) -> tuple[Steps, Collectives]:
    """Returns what is observed in steps of all cases, and the collectives of some on a CPU."""
    num_steps = {name: cases.num_steps_of(name) for name in cases.CASES}
    on_cpu = {name: min(num_steps[name], _MOST_STEPS_ON_CPU) for name in cases.COUNTED_ON_CPU}
    found, collectives = run_check(step_checks.steps_of_rank, str(folder), num_steps, on_cpu, rank)
    assert found.keys() == num_steps.keys()
    assert collectives.keys() == on_cpu.keys()
    steps = {name: [Observed(*step) for step in of_case] for name, of_case in found.items()}
    return steps, collectives


def unlike_those_on_a_cpu(steps: Steps, on_cpu: Collectives) -> Collectives:
    """Returns the collectives of cases that differ from those of the same first steps on a CPU."""
    assert all(on_cpu.values())
    collectives = {
        name: [step.collectives for step in steps[name]][: len(of_case)]
        for name, of_case in on_cpu.items()
    }
    return {name: of_case for name, of_case in collectives.items() if of_case != on_cpu[name]}


def unexpected_in(steps: Steps) -> dict[str, dict[str, list]]:
    """Returns what steps do and should not, by kind and case: the findings of each step."""
    kinds: dict[str, Callable[[str, int, Observed], bool]] = {
        "copies": lambda name, number, step: step.copies == [],
        "reads": lambda name, number, step: _is_documented_read(name, number, step.reads),
        "waits": lambda name, number, step: _is_documented_wait(name, step.waits),
        "races": lambda name, number, step: step.races == [],
    }
    unexpected = {
        kind: {
            name: [getattr(step, kind) for step in of_case]
            for name, of_case in steps.items()
            if not all(may(name, number, step) for number, step in enumerate(of_case, 2))
        }
        for kind, may in kinds.items()
    }
    return {kind: cases for kind, cases in unexpected.items() if cases}


def _is_documented_read(name: str, number: int, reads: list[str]) -> bool:
    operations = [read.split(" at ")[0] for read in reads]
    if name == "skip":
        # Reads the gradient's norm in every step.
        return operations == ["_local_scalar_dense"]
    if name == "adafactor":
        # torch's Adafactor reads the norms of each parameter and of its update.
        return {read.split(":")[0] for read in reads} == {
            "_local_scalar_dense at optim/torch_optimizer.py"
        }
    if cases.CASES[name][0] in ("galore", "fira") and number % cases.PERIOD == 1:
        # Decompositions check on the host whether they converged.
        return set(operations) <= _DECOMPOSITIONS
    return reads == []


def _is_documented_wait(name: str, waits: list[str]) -> bool:
    """Whether the host waits at most for vectors that were put back two steps ago, or for what an
    earlier step has measured: the last one, since cases switch often."""
    may_wait = "host candidates" in name or "least moving" in name
    return waits == [] or (may_wait and waits == ["Event.synchronize"])

"""Steps of cases on fake CUDA tensors: what is observed in them, and what they may do."""

from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

import torch

from support.fake_cuda import collectives, python_api
from support.fake_cuda.cases import NUM_RANKS, PERIOD, config_of, method_of, num_steps_of
from support.fake_cuda.races import FindRaces
from support.fake_cuda.waits import FindBlockingCopies, FindHostReads
from switchtitan.contracts import Batch
from switchtitan.distributed.fsdp import _allocate
from switchtitan.training import build as builder
from switchtitan.training.trainer import RunningLoss
from switchtitan.workbench.benchmark.counters import CountCommunication
from switchtitan.workbench.benchmark.steppers import fake_stepper

Collectives = dict[str, list[float]]
"""Kind -> number and bytes that a rank sends."""
_DECOMPOSITIONS = {"_linalg_svd", "_linalg_eigh"}


class Observed(NamedTuple):
    """What observers found in a step."""

    copies: list[str]
    """Operations between host and device for which the host waits."""
    reads: list[str]
    """Values of the device that the host reads."""
    waits: list[str]
    """Calls that make the host wait for an event, a stream or the device."""
    races: list[str]
    """Accesses to memory that do not wait for each other."""
    collectives: Collectives


@contextmanager
def fake_cuda_stepper(config, num_ranks, rank):
    """Yields the stepper of one of `num_ranks` ranks with a CUDA device each.

    Weights are allocated, not drawn, which would take a third of the time. Run steps inside the
    context, in a process of `process.run_check`.
    """
    # Otherwise every operation waits for the streams of all earlier steppers.
    python_api.forget_streams()
    collectives.forget_streams()
    with _without_initial_values(), fake_stepper(config, num_ranks, "cuda:0", rank) as stepper:
        stepper.batches = _batches(config, num_ranks)
        stepper.on_nonfinite = config.training.on_nonfinite
        yield stepper


def _without_initial_values():
    return patch.object(builder, "materialize", lambda model, device, *_: _allocate(model, device))


def _batches(config, num_ranks):
    """Yields micro-batches in page-locked memory, as the data loader does with a GPU."""
    local_size = config.training.local_batch_size
    num_micro_batches = config.training.global_batch_size // (num_ranks * local_size)
    shape = local_size, config.data.seq_len
    while True:
        parts = [torch.zeros(shape, dtype=d) for d in (torch.int64, torch.int64, torch.int32)]
        for part in parts:
            python_api.pinned_memory.add(part)
        yield [Batch(*parts)] * num_micro_batches


@contextmanager
def observed_stepper(folder, name, rank):
    """Yields the stepper of a case after its first step, and what has observed its accesses."""
    races = FindRaces()
    with fake_cuda_stepper(config_of(folder, name), NUM_RANKS, rank) as stepper:
        with FindHostReads(races):
            stepper.step()
        yield stepper, races


def observe(step, races):
    """Returns what is observed while `step` runs; `races` has observed what ran before."""
    python_api.host_waits.clear()
    races.found.clear()
    copies, sent = FindBlockingCopies(), CountCommunication()
    with FindHostReads(races, copies, sent) as reads:
        step()
    waits = list(python_api.host_waits)
    return Observed(copies.found, reads.found, waits, list(races.found), collectives_in(sent))


def collectives_in(sent):
    return {kind: [count.num_calls, count.bytes_sent] for kind, count in sent.counts.items()}


def collectives_on_cpu(folder, name):
    """Returns the collectives of rank 0 in steps 2, 3, ... of a case on a CPU, for one period."""
    found = []
    with _without_initial_values(), fake_stepper(config_of(folder, name), NUM_RANKS) as stepper:
        stepper.step()
        for _ in range(PERIOD):
            with CountCommunication() as sent:
                stepper.step()
            found.append(collectives_in(sent))
    return found


def steps_of(stepper, name, races):
    """Returns what is observed in steps 2, 3, ... of a case, as a run takes them."""
    loss = RunningLoss(torch.device("cuda", 0))
    step = lambda: loss.add(stepper.step())  # noqa: E731
    return [observe(step, races) for _ in range(num_steps_of(name) - 1)]


def unexpected_in(name, steps):
    """Returns steps of a case that do what is not documented, by number, from 2."""
    return {
        number: step
        for number, step in enumerate(steps, 2)
        if step.copies
        or step.races
        or not _is_documented_wait(name, step.waits)
        or not _is_documented_read(name, number, step.reads)
    }


def _is_documented_read(name, number, reads):
    operations = {read.split(" at ")[0] for read in reads}
    if name == "skip":
        # Reads the gradient's norm in every step.
        return len(reads) == 1 and operations == {"_local_scalar_dense"}
    if name == "adafactor":
        # torch's Adafactor reads the norms of each parameter and of its update.
        files = {read.split(":")[0] for read in reads}
        return files == {"_local_scalar_dense at optim/torch_optimizer.py"}
    if method_of(name) in ("galore", "fira") and number % PERIOD == 1:
        # Decompositions check on the host whether they converged.
        return operations <= _DECOMPOSITIONS
    return not reads


def _is_documented_wait(name, waits):
    """Whether the host waits at most for vectors that were put back two steps ago, or for what an
    earlier step has measured: the last one, since cases switch often."""
    may_wait = "host candidates" in name
    return not waits or (may_wait and waits == ["Event.synchronize"])

"""Steps, saves and measurements of a rank on fake CUDA; called in new processes."""

from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from support.fake_cuda import kernel_checks, python_api
from support.fake_cuda.cases import CASES, NUM_RANKS, ON_CPU, UNEVEN
from support.fake_cuda.steps import collectives_on_cpu, observe, observed_stepper, steps_of
from switchtitan.checkpoint.save import CheckpointTensors, copy_to_host
from switchtitan.distributed.shards import local
from switchtitan.observability.region_times import RegionTimes

TIMED = ("switchlora", "host candidates", "relora", "sharded accumulation")
"""Cases whose regions are timed."""
SAVED = ("switchlora, HSDP", "host candidates, HSDP")
"""Matrices share a storage, and some tensors are in host memory."""
VOCABULARIES = (32100, 32000, 32104)


def steps_of_first_rank(folder):
    """Returns what rank 0 does in steps of all cases."""
    found = {"steps": {}}
    for name in CASES:
        with observed_stepper(Path(folder), name, 0) as (stepper, races):
            found["steps"][name] = steps_of(stepper, name, races)
    on_cpu = {name: collectives_on_cpu(Path(folder), name) for name in sorted(ON_CPU)}
    return found | {"on a CPU": on_cpu}


def steps_of_last_rank(folder):
    """Returns what the rank with the fewest rows does in steps, and in what runs during them."""
    rank = NUM_RANKS - 1
    found = {"steps": {}, "times": {}, "saves": {}}
    for name in sorted(UNEVEN):
        with observed_stepper(Path(folder), name, rank) as (stepper, races):
            if name in TIMED:
                found["steps"][name], found["times"][name] = _timed_steps(stepper, name, races)
            else:
                found["steps"][name] = steps_of(stepper, name, races)
            if name in SAVED:
                found["saves"][name] = _saves(stepper, races)
    return found | {"updates": kernel_checks.kernels_of_updates(Path(folder), rank)}


def kernels_of_first_rank():
    """Returns the kernels of switches and losses."""
    return {
        "switches": kernel_checks.kernels_of_switches(0),
        "losses": [kernel_checks.kernels_of_loss(size) for size in VOCABULARIES],
    }


class LateEvent(python_api.FakeEvent):
    """An event that the device has not passed when the host asks, unless it `has_passed`."""

    has_passed = False

    def query(self):
        return LateEvent.has_passed and super().query()


def _timed_steps(stepper, name, races):
    """Returns what is observed in steps whose regions are timed, and mean times."""
    LateEvent.has_passed = False
    with (
        patch.object(torch.cuda, "Event", LateEvent),
        RegionTimes(torch.device("cuda", 0)) as times,
    ):
        steps = steps_of(stepper, name, races)
        assert not times.means()
        LateEvent.has_passed = True
        return steps, times.means()


def _saves(stepper, races):
    """Returns what each part of two saves does, also if none waits for copies."""
    found = {"saves": [dict(parts) for parts in _two_saves(stepper, races)]}
    with patch.object(python_api.FakeStream, "synchronize", lambda stream: None):
        found["saves without a wait"] = [dict(parts) for parts in _two_saves(stepper, races)]
    return found


def _two_saves(stepper, races):
    """Yields, by part: the search for values that are not finite, the collection of what is saved,
    its copies, reading them in the background, and the next step."""
    tensors = CheckpointTensors(stepper.model, stepper.optimizer)
    memory = dict[str, Tensor]()
    saved, copies = dict[str, Tensor](), dict[str, Tensor]()
    parts = {
        "search": tensors.non_finite,
        "collect": lambda: saved.update(_fake(tensors)),
        "copy": lambda: copies.update(copy_to_host(saved, memory)),
        "write": lambda: [local(copy).clone() for copy in copies.values()],
        "step": stepper.step,
    }
    for _ in range(2):
        yield {name: observe(part, races) for name, part in parts.items()}


def _fake(tensors):
    """Returns what is saved; tensors made from NumPy arrays, which are real, as fake ones."""
    return {
        name: tensor
        if isinstance(local(tensor), FakeTensor)
        else torch.zeros(tensor.shape, dtype=tensor.dtype)
        for name, tensor in tensors().items()
    }

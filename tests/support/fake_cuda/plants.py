"""Mistakes planted on fake CUDA, which observers must find; and what looks alike and is right."""

from contextlib import nullcontext
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from support.fake_cuda.python_api import FakeEvent, FakeStream
from support.fake_cuda.races import FindRaces
from support.fake_cuda.steps import observe, observed_stepper
from support.fake_cuda.waits import FindBlockingCopies
from switchtitan.distributed.copies import CopyToHost, to_device

DEVICE = torch.device("cuda", 0)


def planted(folder):
    """Returns what is found by kind of plant."""
    with observed_stepper(folder, "gathered once", 0) as (stepper, races):
        return {
            "copies": _found(COPIES, _blocking_copies),
            "background copies": _found(BACKGROUND_COPIES, _races_of_background_copies),
            "collectives": _found(COLLECTIVES, _races_of_collective),
            "steps": _step_without_waits(stepper, races),
        }


def _found(plants, find):
    return {kind: {name: find(plants[kind][name]) for name in plants[kind]} for kind in plants}


COPIES = {
    "wrong": {
        "number": lambda table: table.__setitem__(3, 5),
        "pageable": lambda table: torch.ones(4).to(table.device, non_blocking=True),
        "blocking": lambda table: torch.ones(4).pin_memory().to(table.device),
        "indices": lambda table: table[torch.tensor([0, 1])],
        "back": lambda table: table.cpu(),
    },
    "right": {
        "fill": lambda table: table[3:4].fill_(5),
        "page-locked": lambda table: torch.ones(4).pin_memory().to(table.device, non_blocking=True),
    },
}


def _blocking_copies(plant):
    table = torch.zeros(8, device=DEVICE)
    with FindBlockingCopies() as copies:
        plant(table)
    return copies.found


def _record_nothing(stream):
    """Returns an event for which no one waits."""
    return FakeEvent()


def _read_at_once(copy):
    return copy._copy


BACKGROUND_COPIES = {
    "wrong": {
        "events record nothing": patch.object(FakeStream, "record_event", _record_nothing),
        "read at once": patch.object(CopyToHost, "wait", _read_at_once),
    },
    "right": {"no mistake": nullcontext()},
}


def _races_of_background_copies(mistake):
    """Copies to the host and from the host, as host candidates do."""
    with mistake, FindRaces() as races:
        put_back = CopyToHost(torch.ones(8, device=DEVICE).mul(2))
        put_back.wait().add(1)
        for _ in range(2):
            to_device(torch.zeros(8), DEVICE).mul(2)
    return races.found


COLLECTIVES = {
    "wrong": {
        "read at once": lambda table, group: torch.ops._c10d_functional.all_reduce(
            table, "sum", group.group_name
        ),
    },
    "right": {"waited for": lambda table, group: functional.all_reduce(table, "sum", group)},
}


def _races_of_collective(reduce):
    """Returns the races of a functional collective, as of a DTensor, whose result is read."""
    with FindRaces() as races:
        reduce(torch.ones(8, device=DEVICE), dist.group.WORLD).mul(2)
    return races.found


def _step_without_waits(stepper, races):
    """Returns what is observed in a step, and in one in which no stream waits for another."""
    right = observe(stepper.step, races)
    with patch.object(FakeStream, "wait_event", lambda *_: None):
        return list(right), list(observe(stepper.step, races))

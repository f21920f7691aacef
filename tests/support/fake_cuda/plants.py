"""Mistakes planted on fake CUDA, which observers must find; and what looks alike and is right."""

from contextlib import nullcontext
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from support.fake_cuda.python_api import FakeEvent, FakeStream
from support.fake_cuda.races import FindRaces
from support.fake_cuda.steps import observe, observed_stepper
from support.fake_cuda.waits import FindBlockingCopies, FindHostReads
from switchtitan.distributed.copies import CopyToHost, HostCopies

DEVICE = torch.device("cuda", 0)


def planted(folder):
    """Returns what is found by kind of plant."""
    with observed_stepper(folder, "gathered once", 0) as (stepper, races):
        return {
            "copies": _found(COPIES, _blocking_copies),
            "reads": _found(READS, _reads),
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
READS = {
    "wrong": {
        "item": lambda table: table[0].item(),
        "bool": lambda table: bool(table.isfinite().all()),
        "list": lambda table: table.tolist(),
        "nonzero": lambda table: table.nonzero(),
        "mask": lambda table: table[table > 0],
        "svd": lambda table: torch.linalg.svd(table.view(2, 4)),
    },
    "right": {
        "shape": lambda table: table.shape[0] + table.numel(),
        "where": lambda table: torch.where(table > 0, table, 0).any(),
    },
}


def _blocking_copies(plant):
    table = torch.zeros(8, device=DEVICE)
    with FindBlockingCopies() as copies:
        plant(table)
    return copies.found


def _reads(plant):
    """Returns the reads that are found, or the exception."""
    table = torch.zeros(8, device=DEVICE)
    with FindHostReads() as reads:
        try:
            plant(table)
        except Exception as error:
            reads.found.append(type(error).__name__)
    return reads.found


class _StreamWithEmptyEvents(FakeStream):
    """A stream whose events record nothing, so that no one waits for its work."""

    def record_event(self, event=None):
        return event or FakeEvent()


def _read_at_once(copy):
    copy.source = None
    return copy.destination


BACKGROUND_COPIES = {
    "wrong": {
        "other streams are deaf": patch.object(FakeStream, "wait_stream", lambda *_: None),
        "events record nothing": patch.object(torch.cuda, "Stream", _StreamWithEmptyEvents),
        "read at once": patch.object(CopyToHost, "wait", _read_at_once),
        "stream not recorded": patch.object(torch.Tensor, "record_stream", lambda *_: None),
    },
    "right": {"no mistake": nullcontext()},
}


def _races_of_background_copies(mistake):
    """Copies to the host and from the host, as host candidates do."""
    with mistake, FindRaces() as races:
        copies = HostCopies(DEVICE)
        put_back = copies.to_host(torch.ones(8, device=DEVICE).mul(2))
        put_back.wait().add(1)
        for _ in range(2):
            fetched = copies.zeros_on_host(8, torch.float32)
            copies.to_device(fetched).mul(2)
    return races.found


class _Gather:
    """An asynchronous all_gather of `own` into `full`, over two ranks."""

    def __init__(self):
        self.groups = [dist.new_group([0, 1]) for _ in range(2)]
        self.own, self.full = (torch.ones(size, device=DEVICE) for size in (8, 16))
        self.work = self.start(self.full, 0)

    def start(self, full, group):
        work = dist.all_gather_single(full, self.own, group=self.groups[group], async_op=True)
        assert work is not None
        return work

    def wait(self):
        self.work.wait()
        return self

    def wait_for_another(self, group):
        self.start(self.full.new_empty(16), group).wait()
        return self

    def wait_in_another_stream(self):
        with torch.cuda.stream(torch.cuda.Stream()):
            return self.wait()


COLLECTIVES = {
    "wrong": {
        "the result is read at once": lambda gather: gather.full.mul(2),
        "the input is written at once": lambda gather: gather.own.add_(1),
        "another stream waits": lambda gather: gather.wait_in_another_stream().full.mul(2),
        "another group is waited for": lambda gather: gather.wait_for_another(1).full.mul(2),
        "functional, read at once": lambda gather: torch.ops._c10d_functional.all_reduce(
            gather.wait().full, "sum", gather.groups[0].group_name
        ).mul(2),
    },
    "right": {
        "the result is waited for": lambda gather: gather.wait().full.mul_(2),
        "the input is read": lambda gather: gather.own.mul(2),
        "later work is waited for": lambda gather: gather.wait_for_another(0).full.mul_(2),
        "functional": lambda gather: functional.all_reduce(
            gather.wait().full, "sum", gather.groups[0]
        ).mul(2),
    },
}


def _races_of_collective(use):
    with FindRaces() as races:
        use(_Gather())
    return races.found


def _step_without_waits(stepper, races):
    """Returns what is observed in a step, and in one in which no stream waits for another."""
    right = observe(stepper.step, races)
    with patch.object(FakeStream, "wait_event", lambda *_: None):
        return list(right), list(observe(stepper.step, races))

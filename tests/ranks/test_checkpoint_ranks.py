"""Checkpoints on several ranks: the same values and errors for any sharding at save and load."""

import errno
import os
import threading
import time
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from support.checkpoints import (
    WRITER,
    is_writing,
    make_checkpointer,
    num_pieces,
    wait_until_written,
    write_when,
)
from support.ranks import run_rows_on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from switchtitan.checkpoint.load import find_latest, load_tensors_
from switchtitan.checkpoint.save import POLL_INTERVAL
from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.shards import local
from switchtitan.distributed.world import start_world
from switchtitan.errors import CheckpointError
from switchtitan.workbench.benchmark.counters import CountCommunication


def full_values():
    generator = torch.Generator().manual_seed(5)
    return {
        "even": torch.randn(8, 3, generator=generator),
        "uneven": torch.randn(7, 5, generator=generator),
        "empty_shards": torch.randn(1, 6, generator=generator),
        "integers": torch.arange(11),
        "columns": torch.randn(3, 9, generator=generator).to(torch.bfloat16),
        "plain.step": torch.tensor(13),
        "plain.vector": torch.randn(5, generator=generator),
    }


def shard(values, layout="split"):
    """Distributes all but plain tensors: sharded, or also replicated over one mesh dimension."""
    num_ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, num_ranks // 2) if layout == "hybrid" else (num_ranks,))

    def distribute(name, value):
        if name.startswith("plain"):
            return value.clone()
        split = Shard(1) if name == "columns" else Shard(0)
        return distribute_tensor(value, mesh, [Replicate(), split][-mesh.ndim :])

    return {name: distribute(name, value) for name, value in values.items()}


def save_and_change(folder, layout):
    """What is saved in the background does not change any more."""
    checkpointer = make_checkpointer(folder, async_save=True)
    tensors = shard(full_values(), layout)
    checkpointer.save(3, tensors, {"tokens_seen": 9})
    for tensor in tensors.values():
        local(tensor).fill_(-1)
    while checkpointer.latest is None:
        checkpointer.poll(POLL_INTERVAL)
    assert checkpointer.latest.name == "step-000000003"


def load_and_compare(folder, *layouts):
    start_world(ParallelismConfig())
    path = find_latest(folder)
    for layout in layouts:
        expected = shard(full_values(), layout)
        found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        addresses = {name: local(tensor).data_ptr() for name, tensor in found.items()}
        load_tensors_(path, found)
        for name, tensor in expected.items():
            assert torch.equal(local(found[name]), local(tensor)), name
            assert local(found[name]).data_ptr() == addresses[name]


def save_hybrid_and_load_split(folder):
    save_and_change(folder, "hybrid")
    load_and_compare(folder, "split")
    pieces = num_pieces(folder / "step-000000003")
    assert pieces["uneven"] == 2
    # Each piece is a zip archive, which ends with this.
    files = (folder / "step-000000003").glob("__*.distcp")
    num_archives = [file.read_bytes().count(b"PK\x05\x06") for file in files]
    assert sum(num_archives) == sum(pieces.values()), "replicas write no value twice"
    assert len(num_archives) == dist.get_world_size(), "all ranks write"


def poll_a_long_save(folder):
    """Ranks communicate in few polls."""
    checkpointer, may_write = make_checkpointer(folder), threading.Event()
    with pytest.MonkeyPatch.context() as patched:
        write_when(may_write, patched)
        checkpointer.save(1, shard(full_values()), {})
        with CountCommunication() as communication:
            for step in range(3 * POLL_INTERVAL):
                checkpointer.poll(step)
        counts = communication.counts
        assert counts["all_reduce"].num_calls == 3
        assert sum(count.num_calls for count in counts.values()) == 3
        assert is_writing(checkpointer)
        assert checkpointer.latest is None
        if dist.get_rank() == 0:  # the other waits for this one
            time.sleep(0.1)
        may_write.set()
        wait_until_written(checkpointer)
    checkpointer.poll(POLL_INTERVAL)
    assert checkpointer.latest is not None


def fail_on_last_rank(folder):
    """The failure of a background save is raised on all ranks in the same step."""
    checkpointer = make_checkpointer(folder)
    tensors = shard(full_values())
    checkpointer.save(1, tensors, {})
    checkpointer.finish()

    polls = []

    def save_and_poll():
        checkpointer.save(2, tensors, {})
        while True:
            polls.append(checkpointer.poll(len(polls)))
            time.sleep(0.001)

    with pytest.MonkeyPatch.context() as patched:
        if dist.get_rank() == dist.get_world_size() - 1:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            patched.setattr(WRITER, "write_data", Mock(side_effect=full))
        with pytest.raises(CheckpointError) as error:
            save_and_poll()
    assert "on rank 1: [Errno 28] No space left on device" in str(error.value)
    assert len(set(start_world(ParallelismConfig()).gather(len(polls)))) == 1
    assert checkpointer.latest.name == "step-000000001"
    assert not (folder / "step-000000002").exists()


# Number of ranks -> name -> (function of a folder of its own, further arguments).
CHECKS = {
    2: {
        "saved on two": (save_and_change, "split"),
        "long save": (poll_a_long_save,),
        "failure": (fail_on_last_rank,),
    },
    4: {"hybrid loads split": (save_hybrid_and_load_split,)},
}


def run_check(rank, name, folder):
    if name == "loaded on four":
        load_and_compare(folder / "saved on two", "split", "hybrid")
    else:
        check, *args = CHECKS[dist.get_world_size()][name]
        check(folder / name, *args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def errors(folder):
    """By name, of two ranks and then of four."""
    found = run_rows_on_ranks(2, run_check, CHECKS[2], folder)
    return found | run_rows_on_ranks(4, run_check, [*CHECKS[4], "loaded on four"], folder)


@pytest.mark.parametrize("name", [*CHECKS[2], *CHECKS[4], "loaded on four"])
def test_saves_and_failures_are_the_same_on_all_ranks(errors, name):
    assert name not in errors, errors[name]

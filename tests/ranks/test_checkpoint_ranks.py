"""Checkpoints on several ranks: the same values and errors for any sharding at save and load."""

import errno
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.checkpoints import read_tensors
from support.ranks import run_on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from switchtitan.checkpoint import CheckpointConfig, Checkpointer, load_tensors_
from switchtitan.checkpoint.agreement import run_together
from switchtitan.checkpoint.checkpointer import POLL_INTERVAL
from switchtitan.checkpoint.metadata import read_tensors_index
from switchtitan.checkpoint.staging import HostCopies, own_share
from switchtitan.checkpoint.storage import ChecksummingWriter
from switchtitan.checkpoint.verify import check_contents
from switchtitan.distributed.count_collectives import CountCommunication
from switchtitan.errors import CheckpointError


def full_values() -> dict[str, Tensor]:
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


def shard(values: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Distributes all but plain tensors: sharded, or also replicated over one mesh dimension."""
    num_ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, num_ranks // 2) if layout == "hybrid" else (num_ranks,))

    def distribute(name: str, value: Tensor) -> Tensor:
        if name.startswith("plain"):
            return value.clone()
        split = Shard(1) if name == "columns" else Shard(0)
        placements = [Replicate(), split] if layout == "hybrid" else [split]
        return distribute_tensor(value, mesh, placements)

    return {name: distribute(name, value) for name, value in values.items()}


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def make_checkpointer(folder: str, rank: int, **config: object) -> Checkpointer:
    return Checkpointer(
        Path(folder),
        CheckpointConfig(**config),
        identity={"model": "tiny"},
        metadata={},
        is_main=rank == 0,
        group=dist.new_group(backend="gloo"),
        background_group=dist.new_group(backend="gloo"),
    )


def save_and_change(rank: int, folder: str, layout: str) -> None:
    checkpointer = make_checkpointer(folder, rank, async_save=True)
    tensors = shard(full_values(), layout)
    checkpointer.save(3, tensors, {"tokens_seen": 9})
    for tensor in tensors.values():
        local(tensor).fill_(-1)
    while checkpointer.latest is None:
        checkpointer.poll()
    assert checkpointer.latest.name == "step-000000003"


def load_and_compare(rank: int, folder: str, layout: str) -> None:
    path = make_checkpointer(folder, rank).checkpoint_to_resume()
    assert path is not None
    expected = shard(full_values(), layout)
    found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    addresses = {name: local(tensor).data_ptr() for name, tensor in found.items()}
    load_tensors_(path, found)
    for name, tensor in expected.items():
        assert torch.equal(local(found[name]), local(tensor)), name
        assert local(found[name]).data_ptr() == addresses[name]


def load_in_both_layouts(rank: int, folder: str) -> None:
    load_and_compare(rank, folder, "split")
    load_and_compare(rank, folder, "hybrid")


def save_hybrid_and_load_split(rank: int, folder: str) -> None:
    save_and_change(rank, folder, "hybrid")
    load_and_compare(rank, folder, "split")


def test_state_saved_on_two_ranks_loads_on_one_and_four(tmp_path):
    run_on_ranks(2, save_and_change, str(tmp_path), "split")
    check_contents(tmp_path / "step-000000003")
    found = read_tensors(tmp_path / "step-000000003")
    for name, value in full_values().items():
        assert torch.equal(found[name], value), name
    run_on_ranks(1, load_and_compare, str(tmp_path), "split")
    run_on_ranks(4, load_in_both_layouts, str(tmp_path))


def test_replicated_shards_are_saved_once_and_load_in_another_layout(tmp_path):
    run_on_ranks(4, save_hybrid_and_load_split, str(tmp_path))
    index = read_tensors_index(tmp_path / "step-000000003")
    assert len(index.tensors["uneven"].pieces) == 2


def share_tensors(rank: int, layout: str) -> None:
    values = full_values() | {f"plain.{i}": torch.ones(3 + i) for i in range(40)}
    tensors = shard(values, layout)
    own = own_share(tensors)
    num_ranks = dist.get_world_size()
    saved = [dict[str, int]()] * num_ranks
    dist.all_gather_object(saved, {name: local(tensor).nbytes for name, tensor in own.items()})
    for name, value in values.items():
        assert sum(sizes.get(name, 0) for sizes in saved) == value.nbytes, name
        if name.startswith("plain"):
            assert sum(name in sizes for sizes in saved) == 1, name
    plain = [
        sum(size for name, size in sizes.items() if name.startswith("plain")) for sizes in saved
    ]
    largest = max(value.nbytes for name, value in values.items() if name.startswith("plain"))
    assert max(plain) - min(plain) <= largest


def share_in_both_layouts(rank: int) -> None:
    share_tensors(rank, "split")
    share_tensors(rank, "hybrid")


def test_every_value_is_saved_by_one_rank():
    run_on_ranks(4, share_in_both_layouts)


def count_staged_bytes(rank: int, folder: str, layout: str) -> None:
    """Host memory of a background save: each rank copies what it writes, and nothing else."""
    num_copied = [0, 0]
    copy = HostCopies.__call__

    def counted(self: HostCopies, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        copies = copy(self, tensors)
        storages = [local(tensor).untyped_storage() for tensor in copies.values()]
        num_copied[0] += sum({storage._cdata: storage.nbytes() for storage in storages}.values())
        num_copied[1] += len(copies)
        return copies

    HostCopies.__call__ = counted
    frozen = {f"plain.frozen{i}": torch.full((64, 32), float(i)) for i in range(8)}
    values = full_values() | frozen
    # As trained matrices, which share a storage.
    adjacent = torch.arange(8.0 * 64 * 32).view(8, 64, 32)
    values |= {f"plain.adjacent{i}": matrix for i, matrix in enumerate(adjacent)}
    tensors = shard(values, layout)
    checkpointer = make_checkpointer(folder, rank)
    checkpointer.save(1, tensors, {})
    checkpointer.finish()
    of_all_ranks = [0] * dist.get_world_size()
    dist.all_gather_object(of_all_ranks, num_copied[0])
    num_copies = [0] * dist.get_world_size()
    dist.all_gather_object(num_copies, num_copied[1])
    # Copies start at multiples of 16 bytes.
    excess = sum(of_all_ranks) - sum(value.nbytes for value in values.values())
    assert 0 <= excess < 16 * sum(num_copies)
    written = [file.stat().st_size for file in (Path(folder) / "step-000000001").glob("__*.distcp")]
    assert max(written) < 1.5 * min(written)


def test_replicated_frozen_weights_are_copied_to_the_host_once(tmp_path):
    run_on_ranks(2, count_staged_bytes, str(tmp_path / "split"), "split")
    run_on_ranks(4, count_staged_bytes, str(tmp_path / "hybrid"), "hybrid")


def poll_a_long_save(rank: int, folder: str) -> None:
    checkpointer = make_checkpointer(folder, rank)
    write_data = ChecksummingWriter.write_data
    may_write = threading.Event()

    def write_when_allowed(*args: object) -> object:
        assert may_write.wait(60)
        return write_data(*args)

    ChecksummingWriter.write_data = write_when_allowed
    checkpointer.save(1, shard(full_values(), "split"), {})
    with CountCommunication() as communication:
        for _ in range(3 * POLL_INTERVAL):
            checkpointer.poll()
    counts = communication.counts
    assert counts["all_reduce"].num_calls == 3
    assert sum(count.num_calls for count in counts.values()) == 3
    assert checkpointer.is_writing
    assert checkpointer.latest is None
    if rank == 0:  # the others wait for this one
        time.sleep(0.1)
    may_write.set()
    while checkpointer.is_writing:
        time.sleep(0.01)
    for _ in range(POLL_INTERVAL):
        checkpointer.poll()
    assert checkpointer.latest is not None


def test_ranks_communicate_in_few_polls(tmp_path):
    run_on_ranks(2, poll_a_long_save, str(tmp_path))


def fail_on_last_rank(rank: int, folder: str, async_save: bool) -> None:
    checkpointer = make_checkpointer(folder, rank, async_save=async_save)
    tensors = shard(full_values(), "split")
    checkpointer.save(1, tensors, {})
    checkpointer.finish()
    if rank == dist.get_world_size() - 1:

        def no_space(*args: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        ChecksummingWriter.write_data = no_space
    step = 0
    try:
        checkpointer.save(2, tensors, {})
        while step < 10_000:
            step += 1
            checkpointer.poll()
            time.sleep(0.001)
    except CheckpointError as error:
        assert "on rank 1: OSError: [Errno 28] No space left on device" in str(error)  # noqa: PT017
        steps = [0] * dist.get_world_size()
        dist.all_gather_object(steps, step)
        assert len(set(steps)) == 1, f"raised in different steps: {steps}"
    else:
        raise AssertionError("the failed save raised nothing")
    assert checkpointer.latest.name == "step-000000001"
    assert not (Path(folder) / "step-000000002").exists()


@pytest.mark.parametrize("async_save", [False, True])
def test_failure_on_one_rank_is_raised_on_all_in_the_same_step(tmp_path, async_save):
    run_on_ranks(2, fail_on_last_rank, str(tmp_path), async_save)


def save_beside_training(rank: int, folder: str) -> None:
    """Collectives of the training loop run while checkpoints are written."""
    checkpointer = make_checkpointer(folder, rank, keep_latest=2)
    tensors = shard(full_values(), "split")
    for step in range(1, 31):
        total = torch.ones(5)
        dist.all_reduce(total)
        assert (total == dist.get_world_size()).all()
        if step % 5 == 0:
            checkpointer.save(step, tensors, {})
        checkpointer.poll()
    checkpointer.finish()
    if rank == 0:
        assert sorted(path.name for path in Path(folder).iterdir()) == [
            "step-000000025",
            "step-000000030",
        ]


def test_training_collectives_and_asynchronous_saves_do_not_mix(tmp_path):
    run_on_ranks(2, save_beside_training, str(tmp_path))


def save_and_refuse(rank: int, folder: str) -> None:
    save_and_change(rank, folder, "split")
    tensors = {
        name: torch.zeros_like(tensor) for name, tensor in shard(full_values(), "split").items()
    }
    tensors["new"] = tensors.pop("even")
    with pytest.raises(CheckpointError, match="lacks new; it holds even"):
        load_tensors_(Path(folder) / "step-000000003", tensors)
    assert all((local(tensor) == 0).all() for tensor in tensors.values())
    with pytest.raises(CheckpointError, match="already holds 1 checkpoint"):
        make_checkpointer(folder, rank, resume="never").checkpoint_to_resume()


def test_mismatched_tensors_are_refused_on_every_rank(tmp_path):
    run_on_ranks(2, save_and_refuse, str(tmp_path))


def fail_with_a_bug(rank: int) -> None:
    def work() -> int:
        if rank == 1:
            raise ZeroDivisionError("a bug")
        return rank

    with pytest.raises(ZeroDivisionError if rank == 1 else RuntimeError, match="a bug"):
        run_together(work, None)
    assert run_together(lambda: rank, None) == [0, 1]


def test_bug_on_one_rank_stops_all():
    run_on_ranks(2, fail_with_a_bug)

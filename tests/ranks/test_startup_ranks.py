"""The start of a run on two "nodes" of two ranks: agreement on errors, corpora and folders."""

import dataclasses
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_on_ranks
from support.tiny_documents import make_documents, write_json_lines

from switchtitan.checkpoint.agreement import run_together
from switchtitan.data import DataConfig, open_corpus
from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.limits import num_open_files
from switchtitan.distributed.world import World, check_devices_alike, start_world
from switchtitan.errors import ConfigError, CorpusError, EnvironmentMismatchError
from switchtitan.training import output_folder
from switchtitan.training.output_folder import check_output_dir

NUM_RANKS = 4


def start_nodes(rank: int, folder: str) -> tuple[World, Path]:
    """Returns the world, and the folder of this rank's node: ranks 0 and 1, or 2 and 3."""
    world = start_world(ParallelismConfig(timeout_s=120))
    node = Path(folder) / f"node-{rank // 2}"
    if rank % 2 == 0:
        node.mkdir(parents=True)
    dist.barrier()
    return dataclasses.replace(world, is_node_main=rank % 2 == 0), node


def check_agreement(world: World) -> None:
    """An error of one rank is the same error on all."""

    def fail() -> int:
        if world.rank == 2:
            raise CorpusError("no such file")
        return world.rank

    with pytest.raises(CorpusError, match=r"^rank 2 on \S+: no such file$"):
        world.together(fail)
    assert world.together(lambda: 10 * world.rank) == [0, 10, 20, 30]

    def crash() -> None:
        if world.rank == 0:
            raise KeyError("a bug")

    expected = (KeyError, "bug") if world.rank == 0 else (RuntimeError, "rank 0: KeyError: 'a bug'")
    with pytest.raises(expected[0], match=expected[1]):
        world.together(crash)


def check_corpora(world: World, node: Path) -> None:
    documents = make_documents(60)
    if world.is_node_main:
        write_json_lines(node / "text" / "a.jsonl", documents)
    dist.barrier()
    config = DataConfig(
        dataset="jsonl", path=node / "text", vocab_size=300, cache_dir=node / "corpora"
    )
    opened = open_corpus(config, ranks=world, show_progress=False)
    assert opened.folder.parent == node / "corpora"
    assert len(set(world.gather(opened.fingerprint))) == 1

    # One node's own copy is damaged.
    (tokens,) = opened.folder.glob("train-*.bin")
    intact = tokens.read_bytes()
    dist.barrier()
    if world.rank == 2:
        tokens.write_bytes(bytes(len(intact)))
    dist.barrier()
    with pytest.raises(CorpusError, match=r"^rank 2 on .*train-.*delete the folder .*node-1"):
        open_corpus(config, ranks=world, show_progress=False)
    if world.rank == 2:
        tokens.write_bytes(intact)

    # One node reads other documents.
    if world.rank == 2:
        write_json_lines(node / "text" / "a.jsonl", documents[1:])
    dist.barrier()
    with pytest.raises(CorpusError, match=r"^rank 2 on .*; put \[data\] cache_dir on a disk that"):
        open_corpus(config, ranks=world, show_progress=False)

    # One node has no documents, so only the other can prepare.
    if world.rank == 2:
        (node / "text" / "a.jsonl").unlink()
    dist.barrier()
    with pytest.raises(CorpusError, match=r"^rank 2 on .*text"):
        open_corpus(config, ranks=world, show_progress=False)


def check_folders(world: World, folder: Path, node: Path) -> None:
    output_folder._VISIBLE_WITHIN_S = 1.0
    check_output_dir(folder / "shared" / "run", world)
    with pytest.raises(ConfigError, match=r"^rank 2 on .*output_dir on a disk that all nodes"):
        check_output_dir(node / "outputs" / "run", world)
    if world.is_main:
        (folder / "file").touch()
    with pytest.raises(ConfigError, match=r"^\[job\] output_dir = .*file is a file"):
        check_output_dir(folder / "file" / "run", world)
    dist.barrier()
    assert not (folder / "shared").exists()
    assert not (node / "outputs").exists()


def check_timeouts(world: World) -> None:
    """Waits for a rank's work may be long; other waits may not."""
    world = dataclasses.replace(world, timeout=timedelta(seconds=1))

    def work() -> None:
        if world.rank != 0:
            time.sleep(3)

    world.together(lambda: None)  # afterwards the group has the timeout of this world
    world.together(work)
    work()
    if world.rank == 0:  # alone, so that no other rank's timeout closes its connections
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            run_together(lambda: None, world.host_group)


def check_start(rank: int, folder: str) -> None:
    world, node = start_nodes(rank, folder)
    check_agreement(world)
    check_corpora(world, node)
    check_folders(world, Path(folder), node)
    check_timeouts(world)


def test_two_nodes_agree_or_fail_alike(tmp_path: Path) -> None:
    run_on_ranks(NUM_RANKS, check_start, str(tmp_path))


def check_mixed_devices(rank: int) -> None:
    store = dist.distributed_c10d._get_default_store()
    for device in ("cpu", "cuda"):
        check_devices_alike(
            dist.PrefixStore(device, store), device, num_ranks=2, timeout=timedelta(seconds=20)
        )
    with pytest.raises(EnvironmentMismatchError, match="1 of 2 ranks have a GPU"):
        check_devices_alike(
            dist.PrefixStore("mixed", store),
            "cuda" if rank == 0 else "cpu",
            num_ranks=2,
            timeout=timedelta(seconds=20),
        )


def test_ranks_with_and_without_gpus_are_refused() -> None:
    run_on_ranks(2, check_mixed_devices)


def count_files(rank: int, folder: str) -> None:
    world = start_world(ParallelismConfig())
    group = world.new_host_group()
    dist.all_reduce(torch.zeros(1), group=group)
    count = len(os.listdir("/proc/self/fd"))
    Path(folder, f"{world.size}-{rank}").write_text(str(count))
    dist.barrier()


def test_each_rank_costs_the_files_that_the_limit_counts(tmp_path: Path) -> None:
    for num_ranks in (2, 4):
        run_on_ranks(num_ranks, count_files, str(tmp_path))
    few, many = (int((tmp_path / name).read_text()) for name in ("2-1", "4-1"))
    assert many - few == num_open_files(4, "cpu") - num_open_files(2, "cpu")
    assert few < num_open_files(2, "cpu")

"""The start of ranks: what they agree on, and how a launcher reports their end."""

import dataclasses
import json
import os
import re
import threading
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from support.checkpoints import make_checkpointer
from support.insides import wait_for_shared_folders
from support.ranks import run_forked, run_on_ranks
from support.tiny_documents import make_documents, write_json_lines
from torch.distributed.elastic.utils.distributed import get_free_port

from switchtitan.data.config import DataConfig
from switchtitan.data.prepare import open_corpus
from switchtitan.distributed import dtype as compute_dtype
from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.dtype import Bf16Support, dtype_on
from switchtitan.distributed.world import start_world
from switchtitan.errors import ConfigError, CorpusError
from switchtitan.training.output import lock_output_dir


# Two "nodes" of two ranks.
def check_start(rank, folder):
    world = start_world(ParallelismConfig(timeout_s=120))
    node = folder / f"node-{rank // 2}"
    if rank % 2 == 0:
        node.mkdir(parents=True)
    dist.barrier()
    world = dataclasses.replace(world, is_node_main=rank % 2 == 0)
    check_agreement(world)
    check_mixed_hardware(world)
    check_corpora(world, node)
    check_folders(world, folder, node)
    check_timeouts(world)


def check_agreement(world):
    """An error of one rank is the same error on all."""

    def fail():
        if world.rank == 2:
            raise CorpusError("no such file")
        return world.rank

    with pytest.raises(CorpusError, match=r"^rank 2 on \S+: no such file$"):
        world.together(fail)
    assert world.together(lambda: 10 * world.rank) == [0, 10, 20, 30]

    def crash():
        if world.rank == 0:
            raise KeyError("a bug")

    expected = (KeyError, "bug") if world.rank == 0 else (RuntimeError, "rank 0: KeyError: 'a bug'")
    with pytest.raises(expected[0], match=expected[1]):
        world.together(crash)


def check_mixed_hardware(world):
    """bf16 only if all ranks multiply it."""
    supports = [Bf16Support(rank != 1, f"of rank {rank}") for rank in range(world.size)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compute_dtype, "bf16_support", lambda device: supports[world.rank])
        chosen = dtype_on(world.device, "auto", world=world)
        assert chosen.name == "float32"
        assert "of rank 1" in chosen.reason
        patched.setattr(compute_dtype, "bf16_support", lambda device: supports[0])
        assert dtype_on(world.device, "auto", world=world).name == "bfloat16"


def check_corpora(world, node):
    documents = make_documents(60)
    if world.is_node_main:
        write_json_lines(node / "text" / "a.jsonl", documents)
    dist.barrier()
    config = DataConfig(
        dataset="jsonl", path=node / "text", vocab_size=300, cache_dir=node / "corpora"
    )
    opened = open_corpus(config, ranks=world)
    assert opened.folder.parent == node / "corpora"
    assert len(set(world.gather(opened.fingerprint))) == 1

    def refused(*words):
        with pytest.raises(CorpusError, match=r"^rank 2 on ") as error:
            open_corpus(config, ranks=world)
        assert all(word in str(error.value) for word in words)

    # One node's own copy is damaged.
    (tokens,) = opened.folder.glob("train-*.bin")
    intact = tokens.read_bytes()
    dist.barrier()
    if world.rank == 2:
        tokens.write_bytes(bytes(len(intact)))
    dist.barrier()
    refused("train-", "node-1")
    if world.rank == 2:
        tokens.write_bytes(intact)

    # One node reads other documents.
    if world.rank == 2:
        write_json_lines(node / "text" / "a.jsonl", documents[1:])
    dist.barrier()
    refused("cache_dir")

    # One node has no documents, so only the other can prepare.
    if world.rank == 2:
        (node / "text" / "a.jsonl").unlink()
    dist.barrier()
    refused("text")


def check_folders(world, folder, node):
    wait_for_shared_folders(1.0)
    with lock_output_dir(folder / "shared" / "run", world):
        pass
    with (
        pytest.raises(ConfigError, match=r"^rank 2 on .*output_dir"),
        lock_output_dir(node / "outputs" / "run", world),
    ):
        pass
    if world.is_main:
        (folder / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"output_dir = .*writable folder"),
        lock_output_dir(folder / "file" / "run", world),
    ):
        pass


def check_timeouts(world):
    """Waits for a rank's work may be long; other waits may not."""
    world = dataclasses.replace(world, timeout=timedelta(seconds=1))

    def work():
        if world.rank != 0:
            time.sleep(2)

    world.together(lambda: None)  # afterwards the group has the timeout of this world
    world.together(work)
    work()
    if world.rank == 0:  # alone, so that no other rank's timeout closes its connections
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            dist.barrier(group=world.host_group)


def test_two_nodes_agree_or_fail_alike(tmp_path):
    run_on_ranks(4, check_start, tmp_path)


def check_openmp_teams(folder):
    """No thread but the main one keeps an OpenMP team, since a team slows down all others."""
    torch.set_num_threads(2)
    values = torch.randn(1 << 20)

    def num_other_threads():
        values.exp()  # the main thread has its team
        return len(os.listdir("/proc/self/task")) - threading.active_count()

    def check_growth(call, expected):
        before, deadline = num_other_threads(), time.monotonic() + 10
        call()
        # Threads that have ended disappear a moment later.
        while num_other_threads() != before + expected and time.monotonic() < deadline:
            time.sleep(0.01)
        assert num_other_threads() == before + expected

    # A plan of more than 32 KiB, and a tensor that is copied in parallel.
    tensors = {f"weight{index}": torch.ones(3) for index in range(500)} | {"large": values}

    def save(checkpointer):
        for step in (1, 2):
            checkpointer.save(step, tensors, {})
            checkpointer.finish()

    for is_async in (False, True):
        checkpointer = make_checkpointer(folder / str(is_async), async_save=is_async)
        check_growth(partial(save, checkpointer), 0)
    torch.set_num_threads(2)  # undoes the limit for threads that start later
    group = dist.new_group(backend="gloo")
    check_growth(lambda: dist.all_gather_object([None], list(range(100_000)), group=group), 1)


def test_saves_leave_no_openmp_team_behind(tmp_path):
    run_forked(check_openmp_teams, tmp_path)


# A launcher, in a process that has imported torch already; its ranks need little of the package.
ONE_NODE = (
    *("--nnodes", "1", "--nproc_per_node", "2"),
    *("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"),
)


def launch_here(folder, words):
    """Writes how the launcher ended, and its standard output and error."""
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, 0o600), number)
    from switchtitan.cli.main import main

    try:
        main(["launch", *words])
        status = 0
    except SystemExit as end:
        status = end.code
    (folder / "status").write_text(json.dumps(status))


def launch(folder, script, options=ONE_NODE):
    """Returns the exit status and standard error of a launcher."""
    (folder / "ranks.py").write_text(script)
    run_forked(launch_here, folder, [*options, "ranks.py"])
    assert (folder / "stdout").read_text() == ""
    return json.loads((folder / "status").read_text()), (folder / "stderr").read_text()


def test_an_error_is_printed_once_and_training_not_restarted(tmp_path):
    script = (
        "import os\n"
        "from switchtitan.cli import train\n"
        "from switchtitan.errors import UserError\n"
        "def fail(words):\n"
        '    open(f\'{os.environ["RANK"]}-{os.environ["TORCHELASTIC_RESTART_COUNT"]}\', "w")\n'
        "    UserError.exit_status = 4\n"
        '    raise UserError("broken")\n'
        "train.parse_arguments = fail\n"
        "train.run([])\n"
    )
    ended = launch(tmp_path, script, options=(*ONE_NODE, "--max-restarts", "1"))
    assert ended == (4, "error: broken\n")
    assert {file.name[-1] for file in tmp_path.glob("[01]-*")} == {"0"}


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (
            "raise RuntimeError('broken')",
            r"RuntimeError: broken\n(.*\n)*error: .*crashed \(status 1\)",
        ),
        ("raise SystemExit(2)", r"crashed \(status 2\)"),  # without a message
        ("os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
    ],
)
def test_the_first_rank_to_crash_is_named(tmp_path, end, expected):
    script = f"import os, time\nif os.environ['RANK'] == '1': {end}\ntime.sleep(60)\n"
    status, errors = launch(tmp_path, script)
    assert status == 1
    assert re.search(rf"{expected}\n$", errors)
    assert "error: rank 1 on " in errors


def test_a_machine_that_nobody_joins_says_so(tmp_path):
    endpoint = f"localhost:{get_free_port()}"
    options = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "static"]
    options += ["--node_rank", "1", "--rdzv_endpoint", endpoint, "--rdzv_conf", "timeout=1"]
    status, errors = launch(tmp_path, "", options=options)
    assert status == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert f"RDZV_ENDPOINT={endpoint}" in line
    assert "Traceback" not in errors

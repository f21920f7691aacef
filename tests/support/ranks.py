"""Runs a test's function on several ranks, one process each: over gloo, or over NCCL on GPUs."""

import faulthandler
import os
import tempfile
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.elastic.utils.distributed import get_free_port

from support.compiled import choose_backend
from switchtitan.distributed.world import stop_world

# Ranks are forked from a process that has imported these: imports take longer than most tests.
PRELOADED = [
    "pytest",
    "switchtitan.cli.train",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
]
LAUNCHER_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


def run_on_ranks(num_ranks, function, *args, timeout_s=600):
    """Calls an importable `function(rank, *args)` on `num_ranks` gloo ranks; fails, with the rank's
    traceback, if one raised, died, or did not finish in time."""
    _run_all(_run_rank, num_ranks, function, args, timeout_s)


def run_rows_on_ranks(num_ranks, function, rows, *args):
    """Calls `function(rank, row, *args)` for each row, all rows in the same ranks.

    A row that fails, or hangs, ends its ranks; the rows after it get new ones. Returns the errors
    of the rows that failed, by row.
    """
    pending, errors = list(rows), {}
    while pending:
        with tempfile.TemporaryDirectory() as done:
            try:
                run_on_ranks(num_ranks, _call_rows, done, function, pending, args, timeout_s=1500)
                return errors
            except AssertionError as error:
                failed, *pending = pending[len(os.listdir(done)) :]
                errors[failed] = f"{failed}: {error}"
    return errors


def run_forked(function, *args):
    """Calls `function(*args)` in a process of its own, without a launcher's variables."""
    _run_all(_run_alone, 1, function, args, timeout_s=300)


def run_on_gpus(num_ranks, function, *args):
    """Like `run_on_ranks`, with a GPU for each rank; `function` starts the world."""
    _run_all(_run_gpu_rank, num_ranks, function, args, timeout_s=900)


@contextmanager
def started_ranks(num_ranks, target, *args):
    """Yields the processes that call `target(rank, num_ranks, environ, *args)`, and kills them. It
    calls `prepare_rank` first, and is importable from its module."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    environ = dict(os.environ, MASTER_ADDR="localhost", MASTER_PORT=str(get_free_port()))
    ranks = [
        context.Process(target=target, args=(rank, num_ranks, environ, *args))
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.join()


def join_ranks(ranks, timeout_s, ends_with_first=True):
    """Waits until all ranks have ended, or one has failed, as torchrun: the others may wait for it
    in a collective. Returns whether they did in time."""
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in ranks):
        if ends_with_first and any(process.exitcode not in (None, 0) for process in ranks):
            time.sleep(0.5)
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def prepare_rank(rank, num_ranks, environ, sees_gpus=False):
    """Prepares a forked process of a launcher."""
    faulthandler.enable()
    torch.set_num_threads(1)
    choose_backend()
    # Forked ranks would otherwise share numpy's random state.
    np.random.seed()
    # The fork server has the environment of its start.
    os.environ.clear()
    os.environ.update(environ, OMP_NUM_THREADS="1")
    if not sees_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(num_ranks))


def leave_launcher():
    """Removes a launcher's variables."""
    for name in LAUNCHER_VARIABLES:
        del os.environ[name]


def _run_all(run_rank, num_ranks, function, args, timeout_s):
    with tempfile.TemporaryDirectory() as folder:
        with started_ranks(num_ranks, run_rank, folder, function, args) as ranks:
            join_ranks(ranks, timeout_s)
        codes = [process.exitcode for process in ranks]
        errors = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
        assert codes == [0] * num_ranks, "\n".join(
            [*errors, f"exit codes {codes}: -9 is a rank that waited or hung for {timeout_s} s"]
        )


def _run_rank(rank, num_ranks, environ, folder, function, args):
    prepare_rank(rank, num_ranks, environ)
    store = dist.FileStore(f"{folder}/store", num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    _call(rank, folder, function, args)
    dist.destroy_process_group()


def _run_alone(rank, num_ranks, environ, folder, function, args):
    prepare_rank(rank, num_ranks, environ)
    leave_launcher()
    _call(rank, folder, lambda _, *args: function(*args), args)


def _run_gpu_rank(rank, num_ranks, environ, folder, function, args):
    prepare_rank(rank, num_ranks, environ, sees_gpus=True)
    _call(rank, folder, function, args)
    stop_world()


def _call(rank, folder, function, args):
    try:
        function(rank, *args)
        if dist.is_initialized():
            dist.barrier()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)


def _call_rows(rank, done, function, rows, args):
    for place, row in enumerate(rows):
        function(rank, row, *args)
        dist.barrier()
        if rank == 0:
            Path(done, str(place)).touch()

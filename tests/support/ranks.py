"""Runs a test's function on several ranks, one process each: over gloo, or over NCCL on GPUs."""

import faulthandler
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

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

# Ranks with gloo must not use GPUs.
WITHOUT_GPUS = {"CUDA_VISIBLE_DEVICES": ""}
LAUNCHER_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


def run_on_ranks(
    num_ranks: int,
    function: Callable[..., None],
    *args: object,
    timeout_s: float = 600,
    start_method: str = "forkserver",
) -> None:
    """Calls `function(rank, *args)` on `num_ranks` gloo ranks; fails if any of them fails.

    Args:
        function: importable from its module; exceptions in it carry the rank's traceback.
        start_method: "spawn" starts new interpreters, which takes seconds; they preload libraries.

    Raises:
        AssertionError: if a rank raised, died, or did not finish in time.
    """
    _run_all(_run_rank, num_ranks, function, args, timeout_s, start_method)


def run_rows_on_ranks(
    num_ranks: int,
    function: Callable[..., None],
    rows: Iterable[str],
    *args: object,
    timeout_s: float = 1500,
) -> dict[str, str]:
    """Calls `function(rank, row, *args)` for each row, all rows in the same ranks.

    A row that fails, or hangs, ends its ranks; the rows after it get new ones.

    Returns:
        The errors of the rows that failed, by row.
    """
    pending, errors = list(rows), dict[str, str]()
    while pending:
        with tempfile.TemporaryDirectory() as done:
            try:
                run_on_ranks(
                    num_ranks, _call_rows, done, function, pending, args, timeout_s=timeout_s
                )
                return errors
            except AssertionError as error:
                failed, *pending = pending[len(os.listdir(done)) :]
                errors[failed] = f"{failed}: {error}"
    return errors


def run_forked(function: Callable[..., None], *args: object, timeout_s: float = 300) -> None:
    """Calls `function(*args)` in a process of its own, without a launcher's variables.

    Raises:
        AssertionError: as `run_on_ranks`.
    """
    _run_all(_run_alone, 1, function, args, timeout_s)


def run_on_gpus(
    num_ranks: int, function: Callable[..., None], *args: object, timeout_s: float = 900
) -> None:
    """Like `run_on_ranks`, with a GPU for each rank; `function` starts the world."""
    _run_all(_run_gpu_rank, num_ranks, function, args, timeout_s)


def num_gpus() -> int:
    """Returns the number of visible GPUs."""
    return torch.cuda.device_count()


def _run_all(
    run_rank: Callable[..., None],
    num_ranks: int,
    function: Callable[..., None],
    args: tuple,
    timeout_s: float,
    start_method: str = "forkserver",
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context(start_method)
        context.set_forkserver_preload(PRELOADED)
        environ = dict(os.environ, MASTER_ADDR="localhost", MASTER_PORT=str(free_port()))
        ranks = [
            context.Process(
                target=run_rank, args=(rank, num_ranks, folder, environ, function, args)
            )
            for rank in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        try:
            _join(ranks, timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        codes = [process.exitcode for process in ranks]
        errors = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
        assert codes == [0] * num_ranks, "\n".join(
            [*errors, f"exit codes {codes}: -9 is a rank that waited or hung for {timeout_s} s"]
        )


def _join(ranks: list, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        # The others wait in a collective for the failed one.
        if any(process.exitcode not in (None, 0) for process in ranks):
            time.sleep(1.0)
            return
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def _run_rank(rank, num_ranks, folder, environ, function, args):
    _prepare_rank(rank, num_ranks, environ | WITHOUT_GPUS)
    store = dist.FileStore(f"{folder}/store", num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    _call(rank, folder, function, args)
    dist.destroy_process_group()


def _call_rows(
    rank: int, done: str, function: Callable[..., None], rows: list[str], args: tuple
) -> None:
    for place, row in enumerate(rows):
        function(rank, row, *args)
        dist.barrier()
        if rank == 0:
            Path(done, str(place)).touch()


def _run_alone(rank, num_ranks, folder, environ, function, args):
    _prepare_rank(rank, num_ranks, environ | WITHOUT_GPUS)
    for name in LAUNCHER_VARIABLES:
        del os.environ[name]
    _call(rank, folder, lambda _, *args: function(*args), args)


def _run_gpu_rank(rank, num_ranks, folder, environ, function, args):
    _prepare_rank(rank, num_ranks, environ)
    _call(rank, folder, function, args)
    stop_world()


def _prepare_rank(rank: int, num_ranks: int, environ: dict[str, str]) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    choose_backend()
    # Forked ranks would otherwise share numpy's random state.
    np.random.seed()
    # The fork server has the environment of its start.
    os.environ.clear()
    os.environ.update(
        environ,
        OMP_NUM_THREADS="1",
        RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(num_ranks),
    )


def _call(rank: int, folder: str, function: Callable[..., None], args: tuple) -> None:
    try:
        function(rank, *args)
        if dist.is_initialized():
            dist.barrier()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)

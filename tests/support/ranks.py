"""Runs a test's function on several gloo ranks, one process each."""

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Ranks are forked from a process that has imported these: imports take longer than most tests.
_PRELOADED = [
    "pytest",
    "switchtitan.cli.train",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
]


def run_on_ranks(
    num_ranks: int, function: Callable[..., None], *args: object, timeout_s: float = 600
) -> None:
    """Calls `function(rank, *args)` in `num_ranks` new processes; fails if any of them fails.

    Args:
        function: importable from its module; exceptions in it carry the rank's traceback.

    Raises:
        AssertionError: if a rank raised, died, or did not finish in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        ranks = [
            context.Process(
                target=_run_rank, args=(rank, num_ranks, folder, dict(os.environ), function, args)
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
        errors = sorted(Path(folder).glob("error-*"))
        assert not errors, "\n".join(path.read_text() for path in errors)
        codes = [process.exitcode for process in ranks]
        assert codes == [0] * num_ranks, (
            f"exit codes {codes}: a rank hung for {timeout_s} s or died"
        )


def _join(ranks: list, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        # The others wait in a collective for the failed one.
        if any(process.exitcode not in (None, 0) for process in ranks):
            time.sleep(1.0)
            return
        time.sleep(0.05)


def _run_rank(
    rank: int,
    num_ranks: int,
    folder: str,
    environ: dict[str, str],
    function: Callable[..., None],
    args: tuple,
) -> None:
    torch.set_num_threads(1)
    # Forked ranks would otherwise share numpy's random state.
    np.random.seed()
    # The fork server has the environment of its start.
    os.environ.clear()
    os.environ.update(
        environ,
        # Ranks with gloo must not use GPUs.
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1",
        RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_RANK=str(rank),
    )
    store = dist.FileStore(f"{folder}/store", num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    try:
        function(rank, *args)
        dist.barrier()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)
    dist.destroy_process_group()

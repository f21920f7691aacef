"""Runs several training programs at a time, each on its share of the machine."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch

from switchtitan.cores import num_cores
from switchtitan.errors import ConfigError, UserError
from switchtitan.workbench.comparison.runs import Run

OUTPUT_FILE = "output.txt"
"""File in a run's folder with its stdout and stderr."""
_TERMINATION_S, _POLL_S = 30, 0.2

Environment = dict[str, str]


def environments(num_jobs: int) -> list[Environment]:
    """Returns the environment variables of each concurrent job: its GPU, or its share of the cores.
    Raises a ConfigError if there are fewer visible GPUs than jobs."""
    shared = {"OMP_NUM_THREADS": str(max(1, num_cores() // num_jobs)), **os.environ}
    if not torch.cuda.is_available():
        return [shared] * num_jobs
    num_devices = torch.cuda.device_count()
    if num_jobs > num_devices:
        raise ConfigError(f"--jobs {num_jobs}: expected at most {num_devices}, the visible GPUs")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_devices)))
    return [shared | {"CUDA_VISIBLE_DEVICES": device} for device in visible.split(",")[:num_jobs]]


def train_all(
    runs: Sequence[Run], jobs: Sequence[Environment], report: Callable[[Run], bool]
) -> None:
    """Trains every run in its own process, one at a time in each of the environments.

    A stopped run resumes from its newest checkpoint. Training locks its folder, so that two
    processes cannot train one run. Calls `report` with each run that ended, which returns whether
    it has a result. Raises a UserError if it has none; the active runs are stopped and can be
    resumed.
    """
    waiting, free = list(runs), list(jobs)
    active: list[tuple[Run, Environment, subprocess.Popen[bytes]]] = []
    try:
        while waiting or active:
            ended = [entry for entry in active if entry[2].poll() is not None]
            active = [entry for entry in active if entry not in ended]
            free += [job for _, job, _ in ended]
            # First: reports take time, and devices should not wait for them.
            while waiting and free:
                run, job = waiting.pop(0), free.pop(0)
                active.append((run, job, _start(run, job)))
            for run, _, process in ended:
                if not report(run):
                    output = run.folder / OUTPUT_FILE
                    tail = output.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
                    raise UserError(
                        f"training exited with status {process.returncode} and without a result; "
                        f"its output is in {output} and ends with\n" + "\n".join(tail)
                    )
            time.sleep(_POLL_S)
    finally:
        _stop([process for _, _, process in active])


def _start(run: Run, environment: Environment) -> "subprocess.Popen[bytes]":
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / OUTPUT_FILE).open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "switchtitan", "train", *run.arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            # Ctrl-C must reach only the comparison, which stops its runs itself.
            start_new_session=True,
        )


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(_TERMINATION_S)
        except subprocess.TimeoutExpired:
            process.kill()

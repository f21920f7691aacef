"""Runs several training programs at a time, each on its share of the machine."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import Queue
from threading import Lock

import torch

from switchtitan.comparison.plan import Run
from switchtitan.cores import num_cores, threads_per_process
from switchtitan.errors import ConfigError, UserError

OUTPUT_FILE = "output.txt"
"""File in a run's folder with its stdout and stderr."""
_TERMINATION_S = 30


class RunFailedError(UserError):
    """A training program failed for another reason than divergence."""


class Runner:
    """Trains runs in separate processes, up to `num_jobs` at a time.

    A stopped run resumes from its newest checkpoint. Training locks its folder, so that two
    processes cannot train one run.

    Args:
        num_jobs: on GPUs at most the number of visible ones; each job uses one. On a CPU the jobs
            share its cores equally.
    """

    def __init__(self, num_jobs: int) -> None:
        num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if num_devices and num_jobs > num_devices:
            raise ConfigError(
                f"--jobs {num_jobs}: expected at most {num_devices}, the number of visible GPUs"
            )
        self._num_jobs = num_jobs
        self._devices: Queue[str | None] = Queue()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(number) for number in range(num_devices)]
        for job in range(num_jobs):
            self._devices.put(names[job] if num_devices else None)
        given = os.environ.get("OMP_NUM_THREADS")
        self._num_threads = given or str(threads_per_process(num_cores(), num_jobs))
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = Lock()
        self._is_stopped = False

    def run_all(
        self,
        runs: Sequence[Run],
        is_finished: Callable[[Run], bool],
        on_finished: Callable[[Run], None],
    ) -> None:
        """Trains every run.

        Args:
            is_finished: whether a run has a result.
            on_finished: called after each run.

        Raises:
            RunFailedError: if a run fails. The active runs are stopped and can be resumed.
        """
        self._is_stopped = False
        with ThreadPoolExecutor(self._num_jobs) as pool:
            trained = {pool.submit(self._train, run): run for run in runs}
            try:
                for future in as_completed(trained):
                    run, status = trained[future], future.result()
                    if not is_finished(run):
                        raise RunFailedError(_failure(run, status))
                    on_finished(run)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                self._stop()

    def _train(self, run: Run) -> int:
        """Trains a run, and returns the exit status."""
        device = self._devices.get()
        environment = os.environ | {"OMP_NUM_THREADS": self._num_threads}
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        run.folder.mkdir(parents=True, exist_ok=True)
        with (run.folder / OUTPUT_FILE).open("ab") as output, self._lock:
            if self._is_stopped:
                return -1
            process = subprocess.Popen(
                [sys.executable, "-m", "switchtitan", "train", *run.arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C must reach only the comparison, which stops its runs itself.
                start_new_session=True,
            )
            self._processes.add(process)
        status = process.wait()
        self._processes.discard(process)
        self._devices.put(device)
        return status

    def _stop(self) -> None:
        """Stops the runs that still train."""
        with self._lock:
            self._is_stopped = True
            active = list(self._processes)
        for process in active:
            process.terminate()
        for process in active:
            try:
                process.wait(_TERMINATION_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _failure(run: Run, status: int) -> str:
    output = run.folder / OUTPUT_FILE
    tail = output.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
    return (
        f"{run.name} exited with status {status} and without a result; its output is in {output} "
        "and ends with\n" + "\n".join(tail)
    )

"""Runs several training programs at a time, each on its share of the machine."""

import logging
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from switchtitan.comparison.plan import Run
from switchtitan.cores import num_cores, threads_per_process
from switchtitan.errors import ConfigError, UserError
from switchtitan.files import try_lock

logger = logging.getLogger(__name__)

OUTPUT_FILE = "output.txt"
"""File in a run's folder with its stdout and stderr."""
_POLL_S = 0.5
_TERMINATION_S = 30


class RunFailedError(UserError):
    """A training program failed for another reason than divergence."""


class Runner:
    """Trains runs in separate processes, up to `num_jobs` at a time.

    A stopped run resumes from its newest checkpoint. A lock in its folder, which its training
    process also holds, prevents a second process from training it.

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
        self._slots = list(range(num_jobs))
        self._is_on_gpu = num_devices > 0
        self._waited_for: set[Run] = set()
        self._threads = num_threads(num_jobs)

    def run_all(
        self,
        runs: Sequence[Run],
        is_finished: Callable[[Run], bool],
        on_finished: Callable[[Run], None],
    ) -> None:
        """Trains every run.

        Waits for a run that another process is training, e.g. one left by a killed comparison.

        Args:
            is_finished: whether a run is finished; called before a run is started.
            on_finished: called after each run.

        Raises:
            RunFailedError: if a run fails. The active runs are stopped and can be resumed.
        """
        waiting, active = deque(runs), dict[int, tuple[Run, subprocess.Popen[bytes]]]()
        try:
            while waiting or active:
                for slot in [slot for slot in self._slots if slot not in active]:
                    self._fill(slot, waiting, active, is_finished, on_finished)
                for slot, (run, process) in list(active.items()):
                    if process.poll() is not None:
                        del active[slot]
                        if not is_finished(run):
                            raise RunFailedError(_failure(run, process.returncode))
                        on_finished(run)
                time.sleep(_POLL_S)
        finally:
            _stop([process for _, process in active.values()])

    def _fill(
        self,
        slot: int,
        waiting: deque[Run],
        active: dict[int, tuple[Run, subprocess.Popen[bytes]]],
        is_finished: Callable[[Run], bool],
        on_finished: Callable[[Run], None],
    ) -> None:
        """Starts the first run that no other process trains; moves the others to the end."""
        for _ in range(len(waiting)):
            run = waiting.popleft()
            with try_lock(run.folder / "lock", key="output_dir") as lock:
                if lock is None:
                    if run not in self._waited_for:
                        logger.info("waiting for %s, which another process is training", run.name)
                        self._waited_for.add(run)
                    waiting.append(run)
                elif is_finished(run):
                    on_finished(run)
                else:
                    active[slot] = (run, self._start(run, slot, lock))
                    return

    def _start(self, run: Run, slot: int, lock: int) -> subprocess.Popen[bytes]:
        environment = os.environ | {"OMP_NUM_THREADS": str(self._threads)}
        if self._is_on_gpu:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = visible.split(",") if visible else [str(device) for device in self._slots]
            environment["CUDA_VISIBLE_DEVICES"] = names[slot]
        with (run.folder / OUTPUT_FILE).open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "switchtitan", "train", *run.arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[lock],
                # Ctrl-C must reach only the comparison, which stops its runs itself.
                start_new_session=True,
            )


def num_threads(num_jobs: int) -> int:
    """Returns CPU threads per job: OMP_NUM_THREADS if set, else an equal share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() else threads_per_process(num_cores(), num_jobs)


def _failure(run: Run, status: int) -> str:
    output = run.folder / OUTPUT_FILE
    tail = output.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
    return (
        f"{run.name} exited with status {status} and without a result; its output is in {output} "
        "and ends with\n" + "\n".join(tail)
    )


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(_TERMINATION_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

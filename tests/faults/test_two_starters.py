"""Of two runs that are started in one folder, one trains and the other is refused at once."""

import errno
import fcntl
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing.context import ForkServerProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch.multiprocessing as mp
from support.fault_report import IS_LONG, record
from support.fuzzing import num_cases
from support.ranks import PRELOADED
from support.tiny import TINY

from switchtitan.cli import train
from switchtitan.errors import USER_ERROR_STATUS
from switchtitan.training.run_lock import LOCK_FILE, lock_output_dir

NUM_STEPS = 100_000
REFUSED_WITHIN_S = 4.0
"""Less than the time for which a lock without an owner's name is waited for."""
LONGEST_S = 120.0
PLACES = [
    ("kernel locks", "at the same instant"),
    ("files", "while the first trains"),
    ("kernel locks", "while the first trains"),
    ("files", "at the same instant"),
][: num_cases(4, 2)]
"""What locks the folder, and when the second run is started."""


class Starter:
    """A process of `switchtitan train`.

    Args:
        locks: "kernel locks", "files", or "nothing", which is a planted fault.
        barrier: passed immediately before the process locks the folder.
    """

    def __init__(self, folder: Path, name: str, locks: str, barrier: Barrier) -> None:
        self._output = folder / f"{name}.txt"
        self._output.touch()
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        arguments = (write_config(folder), self._output, locks, barrier, dict(os.environ))
        self.process: ForkServerProcess = context.Process(target=_train, args=arguments)
        self.process.start()

    @property
    def said(self) -> str:
        return self._output.read_text()

    @property
    def trains(self) -> bool:
        return re.search(rf"^ *\d+/{NUM_STEPS} +\d", self.said, re.MULTILINE) is not None

    def end(self, number: int) -> None:
        """Ends the run by a signal."""
        os.kill(self.process.pid, number)
        self.process.join(LONGEST_S)
        expected = -number if number == signal.SIGKILL else 128 + number
        assert self.process.exitcode == expected, self.said


def write_config(folder: Path) -> Path:
    file = folder / "job.toml"
    text = TINY.format(folder=folder, method="full_rank", method_keys="")
    text = text.replace("steps = 40", f"steps = {NUM_STEPS}")
    file.write_text(text.replace("interval = 20", "interval = 100000"))
    return file


def _train(config: Path, output: Path, locks: str, barrier: Barrier, environ: dict) -> None:
    os.environ.clear()
    os.environ.update(environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if locks == "files":
        fcntl.lockf = _refuse
    locked = lock_output_dir if locks != "nothing" else lambda *args: nullcontext()
    train.lock_output_dir = _at_the_barrier(locked, barrier)
    train.main(["--config", str(config)])


def _refuse(*args: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def _at_the_barrier(lock: Callable[..., AbstractContextManager[None]], barrier: Barrier) -> object:
    @contextmanager
    def timed_lock(*args: object) -> Iterator[None]:
        barrier.wait(LONGEST_S)
        started = time.monotonic()
        try:
            with lock(*args):
                started = None
                yield
        finally:
            if started is not None:
                print(f"refused after {time.monotonic() - started:.3f} s", flush=True)

    return timed_lock


def wait_until(claim: Callable[[], bool], *starters: Starter) -> None:
    deadline = time.monotonic() + LONGEST_S
    while not claim():
        assert time.monotonic() < deadline, [starter.said for starter in starters]
        time.sleep(0.01)


@contextmanager
def started(folder: Path, locks: str, when: str, number: int = 0) -> Iterator[list[Starter]]:
    """Two runs that are started in one folder."""
    context = mp.get_context("forkserver")
    barrier = context.Barrier(2 if when == "at the same instant" else 1)
    starters = []
    try:
        for name in ("first", "second"):
            starters.append(Starter(folder, f"{name}-{number}", locks, barrier))
            if when == "while the first trains" and name == "first":
                wait_until(lambda: starters[0].trains, *starters)
        yield starters
    finally:
        for starter in starters:
            starter.process.kill()
            starter.process.join()


def check_one_trains(starters: list[Starter], when: str) -> tuple[Starter, float]:
    """Returns the run that trains, and after how many seconds the other one was refused."""
    wait_until(lambda: sum(starter.process.is_alive() for starter in starters) < 2, *starters)
    refused, trains = sorted(starters, key=lambda starter: starter.process.is_alive())
    if when == "while the first trains":
        assert trains is starters[0]
    wait_until(lambda: trains.trains, *starters)
    assert refused.process.exitcode == USER_ERROR_STATUS, refused.said
    owner = f"process {trains.process.pid} on {socket.gethostname()}, started "
    assert owner in refused.said
    assert "trains in this folder" in refused.said
    assert "Traceback" not in refused.said
    assert not refused.trains
    waited = re.search(r"^refused after (\S+) s$", refused.said, re.MULTILINE)
    assert waited is not None
    assert float(waited[1]) < REFUSED_WITHIN_S
    return trains, float(waited[1])


@pytest.mark.parametrize(("locks", "when"), PLACES)
def test_one_of_two_runs_trains(locks: str, when: str, tmp_path: Path) -> None:
    """Every other time, a file of a process that was killed is in the folder."""
    for number in range(5 if IS_LONG else 1):
        with started(tmp_path, locks, when, number) as starters:
            trains, refused_after_s = check_one_trains(starters, when)
            trains.end(signal.SIGTERM if number % 2 else signal.SIGKILL)
        assert (tmp_path / "run" / LOCK_FILE).exists() == (number % 2 == 0)
        facts = {"lock": locks, "second_starts": when, "attempts": 1, "trained": 1, "refused": 1}
        record("two starters", **facts, refused_after_s=refused_after_s)


def test_without_a_lock_both_train(tmp_path: Path) -> None:
    when = "while the first trains"
    with started(tmp_path, "nothing", when) as starters:
        wait_until(lambda: all(starter.trains for starter in starters), *starters)
        starters[1].end(signal.SIGTERM)
        with pytest.raises(AssertionError, match="stopped at step"):
            check_one_trains(starters, when)

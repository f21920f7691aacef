"""Training runs in interpreters of their own, most started by `switchtitan launch`."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from support.interrupted import arguments, saved_steps

PROGRAM = """\
import os, signal, sys
from switchtitan.cli.train import main
from switchtitan.training import stop
from switchtitan.training.stepper import Stepper

step = Stepper.step

def die_in_step_7(stepper):
    if stepper.state.step == 6 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
    return step(stepper)

stop._POLL_S = 0.02
Stepper.step = die_in_step_7
main(sys.argv[1:])
"""
"""Trains; rank 1 is killed in step 7 unless it was restarted."""
FAIL_IN_A_SAVE = """\
import sys, time
from pathlib import Path
from switchtitan.checkpoint import Checkpointer
from switchtitan.cli import train
from switchtitan.training.trainer import Trainer

complete, after_step = Checkpointer._complete, Trainer._after_step

def complete_when_allowed(checkpointer, *args):
    while not Path(sys.argv[1]).exists():
        time.sleep(0.02)
    return complete(checkpointer, *args)

def fail_during_a_save(trainer, result):
    after_step(trainer, result)
    if trainer.checkpointer.is_writing:
        raise RuntimeError("out of memory")

Checkpointer._complete = complete_when_allowed
Trainer._after_step = fail_during_a_save
train.main(sys.argv[2:])
"""
"""Trains on one rank, and fails while its first save is in progress."""
LAUNCH = ("-m", "switchtitan", "launch", "--nproc_per_node", "2", "--max-restarts", "2")
LAUNCH += ("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0")


class Run:
    """A launcher and its two ranks in a session of their own."""

    def __init__(self, process: subprocess.Popen, output: Path, folder: Path) -> None:
        self.process = process
        self._output = output
        self._folder = folder

    @property
    def said(self) -> str:
        return self._output.read_text()

    def reported_steps(self, num_steps: int) -> list[int]:
        return [int(step) for step in re.findall(rf"(\d+)/{num_steps} +\d", self.said)]

    def saved_steps(self) -> list[int]:
        return saved_steps(self._folder)

    def ranks(self) -> list[int]:
        """The processes that the launcher has started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [
            int(child)
            for child in children.split()
            if b"--config" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 180
        while not re.search(text, self.said):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)


@contextmanager
def launched(folder: Path, cache_dir: Path, *keys: str) -> Iterator[Run]:
    """Starts a run on two ranks, of which one is killed in step 7."""
    own = arguments(folder, cache_dir, is_async=False)
    script, output = folder / "program.py", folder / "output.txt"
    script.write_text(PROGRAM)
    with output.open("w") as printed:
        process = subprocess.Popen(
            [sys.executable, *LAUNCH, str(script), *own, *keys],
            stdout=printed,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            # In the background, a shell starts programs that ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        yield Run(process, output, folder)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
        with suppress(ProcessLookupError):  # ranks that hang outlive their launcher
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def start_failing_in_a_save(may_complete: Path, *words: str) -> subprocess.Popen:
    """Starts a run that fails during a save in the background; the save ends once a file exists."""
    return subprocess.Popen(
        [sys.executable, "-c", FAIL_IN_A_SAVE, str(may_complete), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

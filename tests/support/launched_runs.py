"""Training runs in interpreters of their own, most started by `switchtitan launch`."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.interrupted import arguments, saved_steps
from support.sessions import Started, started

PROGRAM = """\
import os, signal, sys
from switchtitan.cli.train import run
from switchtitan.training.step import Stepper

step = Stepper.step

def die_in_step_7(stepper):
    if stepper.state.step == 6 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
    return step(stepper)

Stepper.step = die_in_step_7
run(sys.argv[1:])
"""
"""Trains; rank 1 is killed in step 7 unless it was restarted."""
FAIL_IN_A_SAVE = """\
import sys, time
from pathlib import Path
from switchtitan.checkpoint.save import Checkpointer
from switchtitan.cli import train
from switchtitan.training.trainer import Trainer

complete, after_step = Checkpointer._write, Trainer._after_step

def complete_when_allowed(checkpointer, *args):
    while not Path(sys.argv[1]).exists():
        time.sleep(0.02)
    return complete(checkpointer, *args)

def fail_during_a_save(trainer, result):
    after_step(trainer, result)
    if trainer.checkpointer._in_flight is not None:
        raise RuntimeError("out of memory")

Checkpointer._write = complete_when_allowed
Trainer._after_step = fail_during_a_save
train.run(sys.argv[2:])
"""
"""Trains on one rank, and fails while its first save is in progress."""
LAUNCH = ("-m", "switchtitan", "launch", "--nproc_per_node", "2", "--max-restarts", "2")
LAUNCH += ("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0")


class Run(Started):
    """A launcher and its two ranks."""

    def __init__(self, launcher: Started, folder: Path) -> None:
        super().__init__(launcher.process, launcher.output)
        self._folder = folder

    def reported_steps(self, num_steps: int) -> list[int]:
        return [int(step) for step in re.findall(rf"(\d+)/{num_steps} +\d", self.said)]

    def saved_steps(self) -> list[int]:
        return saved_steps(self._folder)

    def ranks(self) -> list[int]:
        """The processes that the launcher has started."""
        return [
            child
            for child in self.children()
            if b"--config" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]


@contextmanager
def launched(folder: Path, cache_dir: Path, *keys: str) -> Iterator[Run]:
    """Starts a run on two ranks, of which one is killed in step 7."""
    own = arguments(folder, cache_dir, is_async=False)
    script = folder / "program.py"
    script.write_text(PROGRAM)
    command = [sys.executable, *LAUNCH, str(script), *own, *keys]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with started(command, folder / "output.txt", env=environment) as launcher:
        yield Run(launcher, folder)


def start_failing_in_a_save(may_complete: Path, *words: str) -> subprocess.Popen:
    """Starts a run that fails during a save in the background; the save ends once a file exists."""
    return subprocess.Popen(
        [sys.executable, "-c", FAIL_IN_A_SAVE, str(may_complete), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

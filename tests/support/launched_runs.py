"""Training runs in processes of their own, started by a launcher if they have several ranks."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from support.tiny import METHOD_KEYS, TINY

PROGRAM = """\
import errno, fcntl, os, signal, sys, time
from switchtitan.checkpoint.storage import ChecksummingWriter
from switchtitan.cli.train import main
from switchtitan.training.stepper import Stepper

fault = os.environ["FAULT"]
rank, attempt = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
write_data, step = ChecksummingWriter.write_data, Stepper.step

num_saves = 0

def write_slowly(*args):
    global num_saves
    num_saves += 1
    if num_saves > 1:
        time.sleep(30)
    return write_data(*args)

def step_with_fault(stepper):
    if stepper.state.step == 7:
        if fault == "hang" and rank == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault == "die" and (rank, attempt) in (("1", "0"), ("0", "1")):
            os.kill(os.getpid(), signal.SIGKILL)
    return step(stepper)

def refuse(*args):
    raise OSError(errno.ENOLCK, "No locks available")

if "NO_LOCKS" in os.environ:
    fcntl.lockf = refuse
if fault == "slow":
    ChecksummingWriter.write_data = write_slowly
elif fault != "none":
    Stepper.step = step_with_fault
main(sys.argv[1:])
"""
"""Trains, with a fault that a variable names. `slow`: the second save takes half a minute. `hang`:
rank 1 is suspended. `die`: rank 1 is killed, and rank 0 after the first restart."""

LAUNCH = ("launch", "--nproc_per_node", "2", "--rdzv_backend", "c10d")
LAUNCH += ("--rdzv_endpoint", "localhost:0")


class Run:
    """A training run in processes of its own session."""

    def __init__(self, process: subprocess.Popen, output: Path, folder: Path) -> None:
        self.process = process
        self.output = output
        self.checkpoints = folder / "run" / "checkpoints"

    @property
    def said(self) -> str:
        return self.output.read_text()

    @property
    def last_step(self) -> int:
        """The last step that it has reported."""
        return max((int(step) for step in re.findall(r"(\d+)/\d+ +\d", self.said)), default=0)

    def ranks(self) -> list[int]:
        """The processes that the launcher has started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [
            int(child)
            for child in children.split()
            if b"--config" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]

    def saved_steps(self) -> list[int]:
        names = (path.name for path in self.checkpoints.glob("step-*"))
        return sorted(int(name.removeprefix("step-")) for name in names if "." not in name)

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 120
        while not re.search(text, self.said):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def ends_with(self, status: int) -> str:
        """Waits for the end; returns the output."""
        assert self.process.wait(timeout=120) == status, self.said
        assert not (self.checkpoints.parent / "run.lock").exists()
        return self.said


def write_config(folder: Path) -> Path:
    """Writes the configuration of a run that evaluates every 10 steps, and saves the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = METHOD_KEYS["switchlora"]
    text = TINY.format(folder=folder, method="switchlora", method_keys=keys)
    text = text.replace("num_workers = 0", "num_workers = 1").replace(
        "[checkpoint]\ninterval = 20", "[checkpoint]\ninterval = 100000"
    )
    file = folder / "job.toml"
    file.write_text(text.replace("interval = 20", "interval = 10"))
    return file


@contextmanager
def start(
    folder: Path,
    *arguments: str,
    ranks: int = 1,
    fault: str = "none",
    has_locks: bool = True,
    options: tuple[str, ...] = (),
) -> Iterator[Run]:
    """Starts a run of its own process group.

    Args:
        arguments: of `train`.
        has_locks: whether the file system has kernel locks.
        options: of `switchtitan launch`, which starts several ranks.
    """
    config, script, output = write_config(folder), folder / "program.py", folder / "output.txt"
    script.write_text(PROGRAM)
    launcher = () if ranks == 1 else ("-m", "switchtitan", *LAUNCH, *options)
    command = [sys.executable, *launcher, str(script), "--config", str(config), *arguments]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": fault}
    if not has_locks:
        environ["NO_LOCKS"] = ""
    with output.open("w") as printed:
        process = subprocess.Popen(
            command,
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=environ,
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

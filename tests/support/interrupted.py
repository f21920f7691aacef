"""Training runs that receive a signal at a chosen place, and what they leave at the end."""

import os
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

from support.checkpoints import end_of
from support.ranks import join_ranks, leave_launcher, prepare_rank, started_ranks
from support.sessions import started
from support.tiny import tiny_toml
from switchtitan.checkpoint.save import Checkpointer
from switchtitan.cli import train
from switchtitan.data import prepare
from switchtitan.training.evaluate import Evaluator
from switchtitan.training.step import Stepper

NUM_STEPS, INTERVAL = 12, 4
"""Length of a run, and the interval of saves."""
PHASES = {
    "start-up": (train, "build_trainer", 0.15),
    "preparation": (prepare, "prepare_corpus", 0.2),
    "training": (Stepper, "step", 0.05),
    "evaluation": (Evaluator, "__call__", 0.1),
    "save": (Checkpointer, "_write", 0.1),
    "pruning": (Checkpointer, "_prune", 0.01),
}
"""Name of a phase -> owner and name of the function that it is, and about how many seconds it
takes."""
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True)
class Interrupt:
    """A moment at which a process receives a signal.

    Attributes:
        phase: of `PHASES`.
        call: the how-manieth call of its function, from 1.
        delay_s: seconds after the call began; the signal comes in a later call if this one is
            shorter.
        rank: which rank receives it; None: all do, each at its own call.
        number: the signal. After SIGKILL, the other ranks are killed once one has failed, as by
            torchrun; after others, all ranks end by themselves.
    """

    phase: str
    call: int
    delay_s: float = 0.0
    rank: int | None = 0
    number: int = signal.SIGKILL


def random_interrupt(source, phase, num_ranks, is_killed):
    """Returns a random moment of a phase at which a run is killed, or told to stop."""
    delay_s = source.uniform(0, PHASES[phase][2])
    if is_killed:
        calls = {"training": 8, "save": 3, "pruning": 2}
        is_of_main_rank = phase in ("preparation", "pruning")
        rank, number = 0 if is_of_main_rank else source.randrange(num_ranks), signal.SIGKILL
    else:
        calls = {"training": 5, "evaluation": 2}
        rank, number = source.choice([None, *range(num_ranks)]), source.choice(STOPS)
    # The evaluation before the first step is a part of the start.
    call = source.randint(1, calls.get(phase, 1)) + (phase == "evaluation")
    return Interrupt(phase, call, delay_s, rank, number)


def arguments(folder, cache_dir, is_async):
    """Writes the configuration of a run in `folder`; returns the arguments of `train`.

    It evaluates and saves at different steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.toml"
    changes = {
        "steps = 40": f"steps = {NUM_STEPS}",
        "[checkpoint]\ninterval = 20": f"[checkpoint]\ninterval = {INTERVAL}",
        "interval = 20\ntokens": "interval = 3\ntokens",
        "[job]": '[job]\nstop_signal = "SIGUSR1"',
        "async_save = false": f"async_save = {str(is_async).lower()}",
        # Less to compute in a step.
        "num_layers = 2": "num_layers = 1",
    }
    file.write_text(tiny_toml(folder, "switchlora", changes))
    return ["--config", str(file), "--data.cache_dir", str(cache_dir)]


def run(words, num_ranks, log, interrupt=None):
    """Runs `switchtitan train` on gloo ranks; returns the exit codes of all ranks. What rank 0
    prints is appended to the log. Without an interrupt, the ranks end by themselves."""
    kills_others = interrupt is None or interrupt.number == signal.SIGKILL
    with started_ranks(num_ranks, _train, words, log, interrupt) as ranks:
        assert join_ranks(ranks, 120, ends_with_first=kills_others), "a rank hung"
    return [process.exitcode for process in ranks]


def _train(rank, num_ranks, environ, words, log, interrupt):
    prepare_rank(rank, num_ranks, environ)
    if num_ranks == 1:
        leave_launcher()
    target = log if rank == 0 else Path(os.devnull)
    output = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # In the background, a shell starts programs that ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupt is not None and interrupt.rank in (rank, None):
        owner, name, _ = PHASES[interrupt.phase]
        setattr(owner, name, _signals_inside(getattr(owner, name), interrupt))
    train.run(words)


def _signals_inside(function, interrupt):
    """Wraps the function of a phase: the process receives the signal inside of it, wherever it is
    then."""
    num_calls = 0
    inside = threading.Event()

    def send():
        time.sleep(interrupt.delay_s)
        inside.wait()
        os.kill(os.getpid(), interrupt.number)

    @wraps(function)
    def wrapped(*args, **keys):
        nonlocal num_calls
        num_calls += 1
        inside.set()
        if num_calls == interrupt.call:
            threading.Thread(target=send, daemon=True).start()
        try:
            return function(*args, **keys)
        finally:
            inside.clear()

    return wrapped


def outcome(folder):
    """Returns what a finished run has left: equal for equal runs. Its output is in the file `log`.

    Checksums of the files with the tensors of the last checkpoint, the saved state, the last
    printed loss of each step, and the final losses. A run that was stopped in its last evaluation
    has saved its last step before that; the next one evaluates, and keeps the checkpoint.
    """
    checksums, state, final = end_of(folder / "run", NUM_STEPS)
    losses = dict(reported((folder / "log").read_text()))
    if state["evaluated_at"] != NUM_STEPS:
        state |= {"evaluated_at": NUM_STEPS, "last_validation_loss": final["loss/validation"]}
    return checksums, state, losses, final


def reported(printed):
    """The steps that a run has reported, as text, and their losses."""
    return re.findall(rf"^ *(\d+)/{NUM_STEPS} +(\d\S*)", printed, re.MULTILINE)


def steps_in(printed):
    """The steps that a run has reported."""
    return [int(step) for step, _ in reported(printed)]


def saved_steps(folder):
    """The steps of all checkpoints of the run in a folder."""
    names = [path.name for path in (folder / "run" / "checkpoints").glob("step-*")]
    return sorted(int(name.removeprefix("step-")) for name in names if "." not in name)


# Interpreters of their own

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
LAUNCH = ("-m", "switchtitan", "launch", "--nproc_per_node", "2", "--max-restarts", "2")
LAUNCH += ("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0")


def launched(folder, cache_dir, *keys):
    """Starts a run on two ranks, of which one is killed in step 7; see `sessions.started`."""
    own = arguments(folder, cache_dir, is_async=False)
    script = folder / "program.py"
    script.write_text(PROGRAM)
    command = [sys.executable, *LAUNCH, str(script), *own, *keys]
    return started(command, folder / "output.txt")

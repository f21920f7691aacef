"""Training runs that receive a signal at a chosen place, and what they leave at the end."""

import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.multiprocessing as mp

from support.checkpoints import WRITER, tensor_checksums
from support.compiled import choose_backend
from support.ranks import PRELOADED, free_port
from support.tiny import METHOD_KEYS, TINY
from switchtitan.checkpoint.load import verify
from switchtitan.checkpoint.save import Checkpointer
from switchtitan.cli import train
from switchtitan.data import prepare
from switchtitan.training import stop
from switchtitan.training.evaluate import Evaluator
from switchtitan.training.step import Stepper

NUM_STEPS, INTERVAL = 12, 4
"""Length of a run, and the interval of saves."""
PHASES: dict[str, tuple[object, str, float]] = {
    "start-up": (train, "build_trainer", 0.4),
    "preparation": (prepare, "prepare_corpus", 0.2),
    "training": (Stepper, "step", 0.05),
    "evaluation": (Evaluator, "__call__", 0.1),
    "save": (Checkpointer, "_write", 0.1),
    "pruning": (Checkpointer, "_prune", 0.01),
}
"""Name of a phase -> owner and name of the function that it is, and about how many seconds it
takes."""
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_LONGEST_S = 120.0


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


def random_interrupt(
    source: random.Random, phase: str, num_ranks: int, is_killed: bool
) -> Interrupt:
    """Returns a random moment of a phase at which a run is killed, or told to stop."""
    _, _, longest_s = PHASES[phase]
    delay_s = source.uniform(0, longest_s)
    if not is_killed:
        calls = {"training": 5, "evaluation": 2}
        # The evaluation before the first step is a part of the start.
        call = source.randint(1, calls.get(phase, 1)) + (phase == "evaluation")
        rank = source.choice([None, *range(num_ranks)])
        return Interrupt(phase, call, delay_s, rank, source.choice(STOPS))
    calls = {"training": 8, "save": 3, "pruning": 2}
    is_of_main_rank = phase in ("preparation", "pruning")
    rank = 0 if is_of_main_rank else source.randrange(num_ranks)
    return Interrupt(phase, source.randint(1, calls.get(phase, 1)), delay_s, rank)


def arguments(folder: Path, cache_dir: Path, is_async: bool) -> list[str]:
    """Writes the configuration of a run in `folder`; returns the arguments of `train`.

    It evaluates and saves at different steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.toml"
    text = TINY.format(folder=folder, method="switchlora", method_keys=METHOD_KEYS["switchlora"])
    for before, after in (
        ("steps = 40", f"steps = {NUM_STEPS}"),
        ("[checkpoint]\ninterval = 20", f"[checkpoint]\ninterval = {INTERVAL}"),
        ("interval = 20\ntokens", "interval = 3\ntokens"),
        ("[job]", '[job]\nstop_signal = "SIGUSR1"'),
        ("async_save = false", f"async_save = {str(is_async).lower()}"),
        # Less to compute in a step.
        ("num_layers = 2", "num_layers = 1"),
    ):
        assert before in text, before
        text = text.replace(before, after)
    file.write_text(text)
    return ["--config", str(file), "--data.cache_dir", str(cache_dir)]


def run(
    words: list[str],
    num_ranks: int,
    log: Path,
    interrupt: Interrupt | None = None,
    plant: Callable[[], None] | None = None,
) -> list[int]:
    """Runs `switchtitan train` on gloo ranks; returns the exit codes of all ranks.

    Args:
        words: arguments of `switchtitan train`.
        log: what rank 0 prints is appended to it.
        interrupt: None lets the ranks end by themselves.
        plant: called first in every rank; importable from its module.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    environ = dict(os.environ, MASTER_ADDR="localhost", MASTER_PORT=str(free_port()))
    ranks = [
        context.Process(
            target=_train, args=(rank, num_ranks, environ, words, log, interrupt, plant)
        )
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    kills_others = interrupt is None or interrupt.number == signal.SIGKILL
    try:
        _wait(ranks, kills_others)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in ranks]


def _wait(ranks: list[BaseProcess], kills_others: bool) -> None:
    """Waits for all ranks, or for the first one that fails."""
    deadline = time.monotonic() + _LONGEST_S
    while any(process.is_alive() for process in ranks):
        assert time.monotonic() < deadline, "a rank hung"
        if kills_others and any(process.exitcode not in (None, 0) for process in ranks):
            time.sleep(0.2)
            return
        time.sleep(0.01)


def _train(
    rank: int,
    num_ranks: int,
    environ: dict[str, str],
    words: list[str],
    log: Path,
    interrupt: Interrupt | None,
    plant: Callable[[], None] | None,
) -> None:
    os.environ.clear()
    os.environ.update(environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    choose_backend()
    if num_ranks > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks))
        os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(num_ranks))
    target = log if rank == 0 else Path(os.devnull)
    output = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # In the background, a shell starts programs that ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupt is not None and interrupt.rank in (rank, None):
        owner, name, _ = PHASES[interrupt.phase]
        setattr(owner, name, _signals_inside(getattr(owner, name), interrupt))
    if plant is not None:
        plant()
    train.run(words)


def _signals_inside(function: Callable, interrupt: Interrupt) -> Callable:
    """Wraps the function of a phase: the process receives the signal inside of it, wherever it is
    then."""
    num_calls = 0
    inside = threading.Event()

    def send() -> None:
        time.sleep(interrupt.delay_s)
        inside.wait()
        os.kill(os.getpid(), interrupt.number)

    @wraps(function)
    def wrapped(*args: object, **keys: object) -> object:
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


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: equal for equal runs."""

    tensors: dict[str, str]
    """Checksums of the files with the tensors of the last checkpoint."""
    train_state: dict
    losses: dict[str, str]
    """The last printed loss of each step."""


def outcome(folder: Path) -> Outcome:
    """Returns what a finished run has left. Its output is in the file `log`."""
    checkpoint = folder / "run" / "checkpoints" / f"step-{NUM_STEPS:09d}"
    metadata = verify(checkpoint)
    losses = {}
    for line in (folder / "log").read_text().splitlines():
        step, _, rest = line.strip().partition("/")
        if step.isdecimal() and rest.split()[0] == str(NUM_STEPS):
            losses[step] = rest.split()[1]
    return Outcome(
        tensor_checksums(checkpoint),
        json.loads(json.dumps(metadata.train_state)),
        losses,
    )


def steps_in(printed: str) -> list[int]:
    """The steps that a run has reported."""
    return [int(step) for step in re.findall(rf"^ *(\d+)/{NUM_STEPS} +\d", printed, re.MULTILINE)]


def saved_steps(folder: Path) -> list[int]:
    """The steps of all checkpoints of the run in a folder."""
    names = [path.name for path in (folder / "run" / "checkpoints").glob("step-*")]
    return sorted(int(name.removeprefix("step-")) for name in names if "." not in name)


def check_folders(folder: Path) -> None:
    """Every folder that has a checkpoint's name is complete."""
    for step in saved_steps(folder):
        verify(folder / "run" / "checkpoints" / f"step-{step:09d}")


# What can be planted in each rank.


def save_slowly() -> None:
    """The second save takes half a minute."""
    write_data, num_saves = WRITER.write_data, 0

    def write_slowly(*args: object) -> object:
        nonlocal num_saves
        num_saves += 1
        if num_saves > 1:
            time.sleep(30)
        return write_data(*args)

    WRITER.write_data = write_slowly


def save_slowly_and_interrupt() -> None:
    """During the second save, which takes half a minute, a second signal arrives."""
    save_slowly()
    stop.SAME_ACTION_S = 0.3
    write_slowly, num_saves = WRITER.write_data, 0

    def write_and_interrupt(*args: object) -> object:
        nonlocal num_saves
        num_saves += 1
        if num_saves > 1:
            threading.Timer(0.6, os.kill, (os.getpid(), signal.SIGINT)).start()
        return write_slowly(*args)

    WRITER.write_data = write_and_interrupt

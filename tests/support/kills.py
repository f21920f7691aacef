"""Training processes that receive a signal at a chosen place: they are killed, or told to stop."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.multiprocessing as mp

from support.ranks import PRELOADED, free_port
from switchtitan.checkpoint import checkpointer
from switchtitan.cli import train
from switchtitan.data import corpus
from switchtitan.training import stop
from switchtitan.training.evaluate import Evaluator
from switchtitan.training.loss_spikes import LossSpikeGuard
from switchtitan.training.stepper import Stepper

PHASES: dict[str, tuple[object, str]] = {
    "start-up": (train, "build_trainer"),
    "preparation": (corpus, "prepare_planned_corpus"),
    "training": (Stepper, "step"),
    "evaluation": (Evaluator, "__call__"),
    "rollback": (LossSpikeGuard, "_roll_back"),
    "save": (checkpointer.Checkpointer, "_complete"),
    "pruning": (checkpointer, "prune"),
}
"""Name of a phase -> owner and name of the function that it is."""
_LONGEST_S = 120.0
_POLL_S = 0.02
"""Ranks look often for a stop: the steps of a tiny run are short."""


@dataclass(frozen=True)
class Kill:
    """A moment at which a process receives a signal.

    Attributes:
        phase: of `PHASES`.
        call: the how-manieth call of its function, from 1.
        delay_s: seconds after the call began; the signal comes in a later call if this one is
            shorter.
        rank: which rank receives it; None: all do, each at its own call.
        number: the signal. After SIGKILL, the other ranks are killed a moment later, as by
            torchrun; after others, all ranks end by themselves.
    """

    phase: str
    call: int
    delay_s: float
    rank: int | None = 0
    number: int = signal.SIGKILL


def run(
    arguments: list[str],
    num_ranks: int,
    log: Path,
    kill: Kill | None = None,
    plant: Callable[[], None] | None = None,
) -> list[int]:
    """Runs `switchtitan train` on gloo ranks; returns the exit codes of all ranks.

    Args:
        arguments: of `switchtitan train`.
        log: what rank 0 prints is appended to it.
        kill: None lets the ranks end by themselves.
        plant: called first in every rank; importable from its module.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    environ = dict(os.environ, MASTER_ADDR="localhost", MASTER_PORT=str(free_port()))
    ranks = [
        context.Process(target=_train, args=(rank, num_ranks, environ, arguments, log, kill, plant))
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    try:
        _wait(ranks, kills_others=kill is None or kill.number == signal.SIGKILL)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in ranks]


def random_kill(source: random.Random, phase: str, num_ranks: int, longest_s: float) -> Kill:
    """Returns a random moment of a phase.

    Args:
        longest_s: how long the phase lasts.
    """
    calls = {"training": 8, "save": 3, "pruning": 2}
    is_of_main_rank = phase in ("preparation", "pruning")
    return Kill(
        phase,
        call=source.randint(1, calls.get(phase, 1)),
        delay_s=source.uniform(0, longest_s),
        rank=0 if is_of_main_rank else source.randrange(num_ranks),
    )


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
    arguments: list[str],
    log: Path,
    kill: Kill | None,
    plant: Callable[[], None] | None,
) -> None:
    os.environ.clear()
    os.environ.update(environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    if num_ranks > 1:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(num_ranks),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(num_ranks),
        )
    target = log if rank == 0 else Path(os.devnull)
    output = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # In the background, a shell starts programs that ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop._POLL_S = _POLL_S
    if kill is not None and kill.rank in (rank, None):
        owner, name = PHASES[kill.phase]
        setattr(owner, name, _signals_inside(getattr(owner, name), kill))
    if plant is not None:
        plant()
    train.main(arguments)


def _signals_inside(function: Callable, kill: Kill) -> Callable:
    """Wraps the function of a phase: the process receives the signal inside of it, wherever it is
    then."""
    num_calls = 0
    inside = threading.Event()

    def send() -> None:
        time.sleep(kill.delay_s)
        inside.wait()
        os.kill(os.getpid(), kill.number)

    @wraps(function)
    def wrapped(*args: object, **keys: object) -> object:
        nonlocal num_calls
        num_calls += 1
        inside.set()
        if num_calls == kill.call:
            threading.Thread(target=send, daemon=True).start()
        try:
            return function(*args, **keys)
        finally:
            inside.clear()

    return wrapped

"""What only real processes show: a launcher's restarts and signals, and locks of a folder."""

import fcntl
import os
import re
import signal
import socket
import threading
import time
from contextlib import suppress

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from support.checkpoints import refused
from support.launched_runs import launched, start_failing_in_a_save
from support.locks import refuse_kernel_locks, write_owner
from support.long_form import IS_LONG, num_cases
from support.ranks import PRELOADED, run_on_ranks
from support.tiny import tiny_config

from switchtitan.distributed.board import Board
from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.world import start_world
from switchtitan.errors import ConfigError
from switchtitan.training.run_lock import LOCK_FILE, lock_output_dir
from switchtitan.training.signals import StopSignals
from switchtitan.training.stop import RunStop, Stopped

# A launcher.


@pytest.mark.parametrize("receiver", ["launcher", "rank"] if IS_LONG else ["launcher"])
def test_all_ranks_restart_after_one_was_killed_and_stop_after_a_signal(
    corpora, tmp_path, receiver
):
    keys = ("--training.steps", "2000", "--checkpoint.interval", "3")
    with launched(tmp_path, corpora / "corpora", *keys) as run:
        run.wait_for(r"resuming from .*step-000000006(.|\n)* 8/2000 +\d")
        os.kill(run.process.pid if receiver == "launcher" else run.ranks()[-1], signal.SIGTERM)
        assert run.process.wait(timeout=120) == 143, run.said
        said = run.said
    steps = run.reported_steps(2000)
    # Step 7 was not reported before the kill, or was taken twice.
    assert [step for step in steps if step > 7] == list(range(8, steps[-1] + 1))
    assert run.saved_steps()[-1] == steps[-1]
    assert f"rank 1 on {socket.gethostname()} did not answer" in said
    assert said.count("resuming from ") == 1, "a signal restarts nothing"
    assert re.search(rf"stopped at step {steps[-1]}; the same command resumes from", said)
    assert not (tmp_path / "run" / LOCK_FILE).exists()


# Signals.


def test_a_process_that_is_forked_has_its_own_signals():
    with (
        StopSignals() as signals,
        RunStop(signals, None, grace_s=60, timeout_s=60) as stop,
        stop.steps(str),
    ):
        is_set, say_set = os.pipe()
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, lambda number, frame: os._exit(3))
            os.write(say_set, b"1")
            time.sleep(60)
            os._exit(4)
        os.close(say_set)
        with open(is_set, "rb") as from_child:
            assert from_child.read(1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        time.sleep(0.2)
        assert signals.received is None


def take_steps_apart(rank):
    board = Board(rank, 3)
    dist.barrier()
    num_steps, number = 0, None
    with (
        StopSignals() as signals,
        RunStop(signals, board, grace_s=60, timeout_s=60) as stop,
    ):
        if rank == 1:
            threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with suppress(Stopped), stop.steps(str):
            while number is None:
                # As on GPUs, hosts run ahead by different numbers of steps.
                time.sleep(0.02 * (rank + 1))
                num_steps += 1
                stop.note_step()
                number = stop.is_due()
            raise Stopped(number)
        steps = [0] * 3
        dist.all_gather_object(steps, num_steps)
        assert len(set(steps)) == 1, steps
        assert steps[0] > 10


def test_ranks_that_are_steps_apart_stop_after_the_same_step():
    run_on_ranks(3, take_steps_apart)


# Locks.


def start(function, *args):
    """Calls a function in a new process with one end of a pipe; returns the other end too."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    here, there = context.Pipe()
    process = context.Process(target=function, args=(there, *args))
    process.start()
    there.close()
    return process, here


def own_folders(pipe, locks):
    """Tries to lock each given folder at the given time, and releases it when told."""
    if locks == "files":
        fcntl.lockf = refuse_kernel_locks
    world = start_world(ParallelismConfig())
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        start_at, folder = task
        while time.time() < start_at:
            pass
        try:
            with lock_output_dir(folder, world):
                pipe.send("owns")
                pipe.recv()
        except ConfigError as error:
            is_named = f"output_dir = {str(folder)!r}: process " in str(error)
            pipe.send("refused" if is_named else str(error))
            pipe.recv()
        pipe.send("ended")


@pytest.mark.parametrize("locks", ["kernel locks", "files"])
def test_of_two_that_start_at_the_same_instant_one_owns_the_folder(tmp_path, locks):
    """In a new folder, and in one with the file of a process that has ended."""
    starters = [start(own_folders, locks) for _ in range(2)]

    def answers(task=None):
        for _, pipe in starters:
            if task is not None:
                pipe.send(task)
        return sorted(pipe.recv() for _, pipe in starters)

    assert answers() == ["ready"] * 2
    for number in range(num_cases(40, 10)):
        folder = tmp_path / f"run-{number}"
        if number % 2:
            write_owner(folder, start_ticks=1)
        assert answers((time.time() + 0.02, folder)) == ["owns", "refused"]
        assert answers("leave") == ["ended"] * 2
        assert not folder.exists() or not list(folder.iterdir())
    for process, pipe in starters:
        pipe.send(None)
        process.join(60)
        assert process.exitcode == 0


def own_and_fork(pipe, folder):
    with lock_output_dir(folder, start_world(ParallelismConfig())):
        if os.fork() == 0:
            pipe.close()
            time.sleep(20)
            os._exit(0)
        pipe.send("owns")
        time.sleep(60)


def test_a_killed_owner_keeps_nothing_even_if_its_workers_live(tmp_path):
    owner, pipe = start(own_and_fork, tmp_path / "run")
    assert pipe.recv() == "owns"
    owner.kill()
    owner.join()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    with lock_output_dir(tmp_path / "run", start_world(ParallelismConfig())):
        pass
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_the_folder_is_owned_until_a_background_save_is_complete(corpora):
    config = tiny_config(corpora / "lock-and-save", "lora")
    output_dir, may_write = config.job.output_dir, corpora / "may-write"
    (file,) = (corpora / "lock-and-save").glob("*.toml")
    keys = ("--checkpoint.async_save", "true", "--checkpoint.interval", "2")
    process = start_failing_in_a_save(may_write, "--config", str(file), *keys)
    for line in process.stderr:
        if line.endswith("RuntimeError: out of memory\n"):
            break
    # Training has ended, and the context with it.
    world = start_world(ParallelismConfig())
    with (
        refused(f"process {process.pid} ", error=ConfigError),
        lock_output_dir(output_dir, world),
    ):
        pass
    may_write.touch()
    assert process.wait(60) == 1
    assert (output_dir / "checkpoints" / "step-000000002").is_dir()
    assert not (output_dir / LOCK_FILE).exists()

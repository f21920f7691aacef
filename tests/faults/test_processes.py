"""What only real processes show: a launcher's restarts and signals, and locks of a folder."""

import os
import re
import signal
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.checkpoints import make_checkpointer, refused, write_when
from support.commands import run as run_command
from support.insides import wait_for_owners
from support.interrupted import launched, saved_steps
from support.long_form import IS_LONG, num_cases
from support.ranks import PRELOADED, run_on_ranks
from support.tiny import tiny_trainer

from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.world import start_world
from switchtitan.errors import ConfigError
from switchtitan.training.output import OWNER_FILE, lock_output_dir
from switchtitan.training.stop import Stop, Stopped


@pytest.mark.parametrize("receiver", ["job", "rank"] if IS_LONG else ["job"])
def test_all_ranks_restart_after_one_was_killed_and_stop_after_a_signal(
    corpora, tmp_path, monkeypatch, receiver
):
    keys = ("--training.steps", "2000", "--checkpoint.interval", "3")
    keys += ("--checkpoint.async_save", "true", "--data.num_workers", "1")
    with launched(tmp_path, corpora / "corpora", *keys) as run:
        # The save of step 6 may not be complete when a rank is killed in step 7.
        run.wait_for(r"resuming from .*step-00000000[36](.|\n)* 8/2000 +\d")
        wait_for_owners(monkeypatch, 0.1)
        second = ("--config", tmp_path / "config.toml", "--data.cache_dir", corpora / "corpora")
        run_command("train", *second).check_refused("trains in this folder")
        ranks = run.children(b"--config")
        if receiver == "job":  # as a scheduler: the launcher, and ranks with their loaders' workers
            for group in (run.process.pid, *ranks):
                os.killpg(group, signal.SIGTERM)
        else:
            os.kill(ranks[-1], signal.SIGTERM)
        assert run.process.wait(timeout=120) == 143, run.said
        said = run.said
    steps = [int(step) for step in re.findall(r"(\d+)/2000 +\d", said)]
    # Step 7 was not reported before the kill, or was taken twice.
    assert [step for step in steps if step > 7] == list(range(8, steps[-1] + 1))
    assert saved_steps(tmp_path)[-1] == steps[-1]
    assert said.count("resuming from ") == 1, "a signal restarts nothing"
    assert "Traceback" not in said.partition("resuming from ")[2]
    assert re.search(rf"stopped at step {steps[-1]}; the same command resumes from", said)
    assert not (tmp_path / "run" / OWNER_FILE).exists()


def take_steps_apart(rank):
    num_steps = 0
    with Stop() as stop, suppress(Stopped), stop.steps(str, 60, dist.group.WORLD):
        while num_steps < 20:
            # As on GPUs, hosts are not at the same place of a step.
            time.sleep(0.02 * (rank + 1))
            num_steps += 1
            if (rank, num_steps) == (1, 7):
                os.kill(os.getpid(), signal.SIGTERM)
            stop.raise_if_due()
    assert num_steps == 8


def test_ranks_that_are_steps_apart_stop_after_the_same_step():
    run_on_ranks(3, take_steps_apart)


def train_with_a_late_rank(rank, folder):
    keys = ("--parallelism.timeout_s", "60", "--parallelism.step_timeout_s", "2")
    trainer = tiny_trainer(folder, "full_rank", *keys, num_ranks=2)
    step = trainer.stepper.step

    def late_step():
        if rank == 1 and trainer.stepper.state.step in (0, 3):
            time.sleep(6)
        return step()

    trainer.stepper.step = late_step
    began_at = time.monotonic()
    with pytest.raises(RuntimeError, match=r"[Tt]imed out" if rank == 0 else "clos|reset"):
        trainer.train()
    assert trainer.stepper.state.step == 3, "the first step may be late"
    assert time.monotonic() - began_at > 6
    os._exit(0)  # the ranks no longer meet


def test_a_rank_that_hangs_after_the_first_step_ends_the_run_soon(corpora):
    run_on_ranks(2, train_with_a_late_rank, corpora / "late")


def start(function, *args):
    """Calls a function in a new process with one end of a pipe; returns the other end too."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    here, there = context.Pipe()
    process = context.Process(target=function, args=(there, *args), daemon=True)
    process.start()
    there.close()
    return process, here


def own_folders(pipe):
    """Tries to lock each given folder at the given time, and releases it when told."""
    wait_for_owners(pytest.MonkeyPatch(), 0.0)
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
            pipe.send("refused" if "trains in this folder" in str(error) else str(error))
            pipe.recv()
        pipe.send("ended")


def test_of_two_that_start_at_the_same_instant_one_owns_the_folder(tmp_path):
    """In a new folder, and in one that another process has locked before."""
    starters = [start(own_folders) for _ in range(2)]

    def answers(task=None):
        for _, pipe in starters:
            if task is not None:
                pipe.send(task)
        return sorted(pipe.recv() for _, pipe in starters)

    assert answers() == ["ready"] * 2
    for number in range(num_cases(40, 10)):
        folder = tmp_path / f"run-{number // 2}"
        assert answers((time.time() + 0.02, folder)) == ["owns", "refused"]
        assert answers("leave") == ["ended"] * 2
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
    assert (tmp_path / "run" / OWNER_FILE).exists()
    with lock_output_dir(tmp_path / "run", start_world(ParallelismConfig())):
        pass
    assert not (tmp_path / "run" / OWNER_FILE).exists()


def own_and_fail_in_a_save(pipe, home):
    checkpointer = make_checkpointer(home / "checkpoints")
    write_when(SimpleNamespace(wait=pipe.poll), pytest.MonkeyPatch())
    with suppress(RuntimeError), lock_output_dir(home, start_world(ParallelismConfig())):
        checkpointer.save(2, {"weight": torch.ones(3)}, {})
        raise RuntimeError("out of memory")
    pipe.send("failed")


def test_the_folder_is_owned_until_a_background_save_is_complete(tmp_path, monkeypatch):
    home = tmp_path / "run"
    process, pipe = start(own_and_fail_in_a_save, home)
    assert pipe.recv() == "failed"
    world = start_world(ParallelismConfig())
    wait_for_owners(monkeypatch, 0.1)
    with refused(f"process {process.pid} ", error=ConfigError), lock_output_dir(home, world):
        pass
    pipe.send("write")
    process.join(60)
    assert process.exitcode == 0
    assert (home / "checkpoints" / "step-000000002").is_dir()
    with lock_output_dir(home, world):
        pass

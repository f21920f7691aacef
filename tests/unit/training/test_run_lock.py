"""One process at a time owns a run's folder; an owner that died does not keep it."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.tiny import tiny_config

from switchtitan.cli import train
from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.world import World, start_world, stop_world
from switchtitan.errors import ConfigError
from switchtitan.training import run_lock
from switchtitan.training.lock_owner import this_process
from switchtitan.training.run_lock import LOCK_FILE, lock_output_dir

OWNER = """
import os, sys, time
from pathlib import Path
from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.world import start_world, stop_world
from switchtitan.errors import ConfigError
from switchtitan.training.run_lock import lock_output_dir

world = start_world(ParallelismConfig())
print("ready", flush=True)
sys.stdin.readline()
try:
    with lock_output_dir(Path(sys.argv[1]), world):
        if "fork" in sys.argv and os.fork() == 0:
            os.close(1)
            time.sleep(60)
            os._exit(0)
        print("owns", flush=True)
        sys.stdin.readline()
except ConfigError as error:
    print(error, flush=True)
# Threads of a process group that live on at the exit can abort the process.
stop_world()
"""


@pytest.fixture
def world() -> Iterator[World]:
    yield start_world(ParallelismConfig())
    stop_world()


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "run"


def start(output_dir: Path, *options: str) -> subprocess.Popen:
    """A process that tries to own the folder after a line of input, until another one."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(output_dir), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def test_a_second_process_is_refused_at_once_and_the_first_is_named(output_dir, world, caplog):
    caplog.set_level("INFO", "switchtitan")
    owner = start(output_dir)
    go(owner)
    assert owner.stdout.readline() == "owns\n"
    before = (output_dir / LOCK_FILE).read_bytes()
    with (
        pytest.raises(
            ConfigError,
            match=rf"^\[job\] output_dir = .*: process {owner.pid} on {socket.gethostname()}, .* "
            "or choose another output_dir$",
        ),
        lock_output_dir(output_dir, world),
    ):
        pass
    assert caplog.messages == [], "waits"
    assert (output_dir / LOCK_FILE).read_bytes() == before
    go(owner)
    assert owner.wait(60) == 0
    assert not output_dir.parent.exists()
    with lock_output_dir(output_dir, world):
        assert json.loads((output_dir / LOCK_FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("options", [(), ("fork",)])
def test_a_killed_owner_keeps_nothing_even_if_its_workers_live(output_dir, world, options):
    owner = start(output_dir, *options)
    go(owner)
    assert owner.stdout.readline() == "owns\n"
    owner.send_signal(signal.SIGKILL)
    owner.wait(60)
    assert (output_dir / LOCK_FILE).exists()
    with lock_output_dir(output_dir, world):
        pass
    assert not (output_dir / LOCK_FILE).exists()


def test_of_many_that_start_together_one_owns_the_folder(output_dir):
    processes = [start(output_dir) for _ in range(4)]
    for process in processes:
        go(process)
    answers = [process.stdout.readline() for process in processes]
    assert answers.count("owns\n") == 1, answers
    assert all("trains in this folder" in answer for answer in answers if answer != "owns\n")
    go(processes[answers.index("owns\n")])
    assert [process.wait(60) for process in processes] == [0] * 4


def test_an_owner_that_has_not_replaced_the_name_of_a_killed_one_is_waited_for(
    output_dir, world, monkeypatch
):
    owner = start(output_dir)
    go(owner)
    assert owner.stdout.readline() == "owns\n"
    file = output_dir / LOCK_FILE
    named, wait = file.read_bytes(), run_lock._wait
    write_owner(output_dir, pid=owner.pid, start_ticks=1)

    def wait_and_name_owner(*args):
        deadline = wait(*args)
        file.write_bytes(named)
        return deadline

    monkeypatch.setattr(run_lock, "_wait", wait_and_name_owner)
    since = re.escape(json.loads(named)["since"])
    message = f"process {owner.pid} on {socket.gethostname()}, started {since}, "
    with pytest.raises(ConfigError, match=message), lock_output_dir(output_dir, world):
        pass
    assert file.read_bytes() == named, "did not wait"
    owner.kill()
    owner.wait(60)


def start_elsewhere(output_dir: Path, **values: str) -> subprocess.Popen:
    """Starts an owner and lets its file name another host, or other values."""
    owner = start(output_dir)
    go(owner)
    assert owner.stdout.readline() == "owns\n"
    file = output_dir / LOCK_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | (values or {"host": "elsewhere"})))
    return owner


@pytest.fixture
def polling(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(run_lock, "_POLL_S", 0.05)
    caplog.set_level("INFO", "switchtitan")


@pytest.mark.parametrize("is_killed", [True, False], ids=["crashes", "ends"])
def test_the_lock_of_another_host_is_waited_for(
    output_dir, world, polling, caplog, monkeypatch, is_killed
):
    owner = start_elsewhere(output_dir)
    wait = run_lock._wait

    def wait_and_end_owner(folder, first_deadline):
        deadline = wait(folder, first_deadline)
        if first_deadline is None:
            owner.kill() if is_killed else go(owner)
        return deadline

    monkeypatch.setattr(run_lock, "_wait", wait_and_end_owner)
    with lock_output_dir(output_dir, world):
        assert owner.wait(60) == (-signal.SIGKILL if is_killed else 0)
        assert json.loads((output_dir / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert caplog.messages == ["waiting for the lock of elsewhere"]


def test_a_lock_that_another_host_keeps_is_respected(
    output_dir, world, polling, caplog, monkeypatch
):
    monkeypatch.setattr(run_lock, "_LEASE_S", 0.5)
    owner = start_elsewhere(output_dir)
    started = time.monotonic()
    with (
        pytest.raises(ConfigError, match=rf"process {owner.pid} on elsewhere, .* delete "),
        lock_output_dir(output_dir, world),
    ):
        pass
    assert time.monotonic() - started >= 0.5
    assert caplog.messages == ["waiting for the lock of elsewhere"]
    owner.kill()
    owner.wait(60)


def test_the_lock_of_a_machine_with_the_same_name_is_waited_for(
    output_dir, world, polling, caplog, monkeypatch
):
    monkeypatch.setattr(run_lock, "_LEASE_S", 0.2)
    owner, host = start_elsewhere(output_dir, boot_id="other"), socket.gethostname()
    with (
        pytest.raises(ConfigError, match=rf"process {owner.pid} on {host}, .* delete "),
        lock_output_dir(output_dir, world),
    ):
        pass
    assert caplog.messages == [f"waiting for the lock of {host}"]
    owner.kill()
    owner.wait(60)


def test_a_training_run_says_that_it_waits_for_a_lock(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_lock, "_POLL_S", 0.05)
    monkeypatch.setattr(run_lock, "_LEASE_S", 0.2)
    config = tiny_config(tmp_path, "lora")
    owner = start_elsewhere(config.job.output_dir)
    (file,) = tmp_path.glob("*.toml")
    with pytest.raises(SystemExit) as stopped:
        train.main(["--config", str(file)])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == "waiting for the lock of elsewhere\n"
    assert "trains in this folder" in said.err
    owner.kill()
    owner.wait(60)


TRAINING = """
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


def test_the_lock_is_kept_until_a_background_save_is_complete(tmp_path, world):
    config = tiny_config(tmp_path, "lora")
    output_dir, may_write = config.job.output_dir, tmp_path / "may-write"
    (file,) = tmp_path.glob("*.toml")
    arguments = ["--config", str(file), "--checkpoint.async_save", "true"]
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(may_write), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.endswith("RuntimeError: out of memory\n"):
            break
    # Training has ended, and the context with it.
    with (
        pytest.raises(ConfigError, match=f"process {process.pid} .* trains in this folder"),
        lock_output_dir(output_dir, world),
    ):
        pass
    may_write.touch()
    assert process.wait(60) == 1
    assert (output_dir / "checkpoints" / "step-000000020").is_dir()
    assert not (output_dir / LOCK_FILE).exists()


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)


@pytest.fixture(params=["with locks", "without locks"])
def with_or_without_locks(request: pytest.FixtureRequest) -> None:
    if request.param == "without locks":
        request.getfixturevalue("without_locks")


WRITES = [("with locks", function) for function in ("open", "ftruncate", "pwrite", "fsync")]
WRITES += [("without locks", function) for function in ("fsync", "link")]


@pytest.mark.parametrize(
    ("with_or_without_locks", "function"), WRITES, indirect=["with_or_without_locks"]
)
def test_a_disk_without_space_is_an_error_of_the_user(
    output_dir, world, with_or_without_locks, monkeypatch, function
):
    original = getattr(os, function)

    def fail(target: object, *args: object) -> object:
        if function == "open" and not str(target).endswith(LOCK_FILE):
            return original(target, *args)
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as planted:
        planted.setattr(os, function, fail)
        with (
            pytest.raises(ConfigError, match=r"^\[job\] output_dir = .*Disk quota exceeded"),
            lock_output_dir(output_dir, world),
        ):
            pass
    assert not output_dir.parent.exists()
    with lock_output_dir(output_dir, world):
        pass


def test_the_user_of_a_lock_that_cannot_be_opened_is_named(output_dir, world, monkeypatch):
    write_owner(output_dir)
    user = (output_dir / LOCK_FILE).owner()
    original = os.open

    def refuse(path: object, flags: int, *args: object) -> int:
        if str(path).endswith(LOCK_FILE) and not flags & os.O_EXCL:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse)
    message = rf"{LOCK_FILE} belongs to the user {user} and cannot be locked \(Permission denied\)"
    with pytest.raises(ConfigError, match=message), lock_output_dir(output_dir, world):
        pass


def write_owner(output_dir: Path, **values: object) -> bytes:
    """Writes the file of this process without a kernel lock, with other values."""
    output_dir.mkdir(parents=True, exist_ok=True)
    owner = this_process(has_kernel_lock=False).model_copy(update=values)
    contents = owner.model_dump_json().encode()
    (output_dir / LOCK_FILE).write_bytes(contents)
    return contents


HAS_ENDED = {"host": "elsewhere", "slurm_job": "71", "slurm_restarts": 0}


@pytest.fixture
def requeued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")


def test_without_file_locks_a_file_names_the_owner(output_dir, world, without_locks):
    with lock_output_dir(output_dir, world):
        assert json.loads((output_dir / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not output_dir.exists()


def test_without_file_locks_the_file_of_a_process_that_has_ended_is_taken_over(
    output_dir, world, without_locks, requeued
):
    write_owner(output_dir, **HAS_ENDED)
    with lock_output_dir(output_dir, world):
        owner = json.loads((output_dir / LOCK_FILE).read_text())
        assert (owner["pid"], owner["slurm_restarts"]) == (os.getpid(), 1)
    assert not list(output_dir.iterdir())


@pytest.mark.parametrize(
    ("host", "values"),
    [
        (socket.gethostname(), {}),
        (socket.gethostname(), {"boot_id": "other", "start_ticks": 1}),
        ("elsewhere", {}),
    ],
    ids=["this host", "another machine of the same name", "another host"],
)
def test_an_owner_that_may_live_is_respected(
    output_dir, world, with_or_without_locks, host, values
):
    # With locks: another node may see the same file system without.
    before = write_owner(output_dir, host=host, since="2026-01-02", **values)
    message = (
        rf"process {os.getpid()} on {host}, started 2026-01-02, trains in this folder; .* "
        f"or delete .*{LOCK_FILE} if it is known to have ended, or choose another output_dir$"
    )
    with pytest.raises(ConfigError, match=message), lock_output_dir(output_dir, world):
        pass
    assert [file.name for file in output_dir.iterdir()] == [LOCK_FILE]
    assert (output_dir / LOCK_FILE).read_bytes() == before


@pytest.mark.parametrize("target", ["missing", "notes.txt"])
def test_a_link_in_place_of_the_lock_is_refused_and_not_followed(output_dir, world, target):
    output_dir.mkdir(parents=True)
    (output_dir / "notes.txt").write_text("notes")
    (output_dir / LOCK_FILE).symlink_to(target)
    with (
        pytest.raises(ConfigError, match=f"{LOCK_FILE} is a link; delete it"),
        lock_output_dir(output_dir, world),
    ):
        pass
    assert (output_dir / "notes.txt").read_text() == "notes"
    assert not (output_dir / "missing").exists()


def test_without_file_locks_an_unknown_owner_is_respected(
    output_dir, world, without_locks, monkeypatch
):
    monkeypatch.setattr(run_lock, "_CHANGES_WITHIN_S", 0.1)
    output_dir.mkdir(parents=True)
    (output_dir / LOCK_FILE).write_text("of an unknown kind")
    with (
        pytest.raises(ConfigError, match=f"another process trains .* delete .*{LOCK_FILE}"),
        lock_output_dir(output_dir, world),
    ):
        pass
    assert (output_dir / LOCK_FILE).read_text() == "of an unknown kind"


def test_without_file_locks_an_empty_file_is_deleted_after_some_time(
    output_dir, world, without_locks, monkeypatch
):
    monkeypatch.setattr(run_lock, "_CHANGES_WITHIN_S", 0.3)
    output_dir.mkdir(parents=True)
    (output_dir / LOCK_FILE).touch()
    started = time.monotonic()
    with lock_output_dir(output_dir, world):
        assert time.monotonic() - started > 0.3
        assert json.loads((output_dir / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not list(output_dir.iterdir())


KILLED = """
import errno, fcntl, os, signal, sys
from pathlib import Path
from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.world import start_world
from switchtitan.training import run_lock

def refuse(*args):
    raise OSError(errno.ENOLCK, "No locks available")

def write_in_place(file, contents):
    with file.open("xb") as stream:
        os.fsync(stream.fileno())
        stream.write(contents)

fcntl.lockf = refuse
if "in place" in sys.argv:
    run_lock.create_atomically = write_in_place
world = start_world(ParallelismConfig())
setattr(os, sys.argv[2], lambda *args, **keys: os.kill(os.getpid(), signal.SIGKILL))
with run_lock.lock_output_dir(Path(sys.argv[1]), world):
    pass
"""


def kill_in(function: str, output_dir: Path, *options: str) -> None:
    """Kills a process that locks the folder, in its first call of a function of `os`."""
    command = [sys.executable, "-c", KILLED, str(output_dir), function, *options]
    assert subprocess.run(command).returncode == -signal.SIGKILL


@pytest.mark.parametrize("function", ["fsync", "link"])
def test_without_file_locks_a_kill_while_the_file_is_created_leaves_none(
    output_dir, world, without_locks, function
):
    kill_in(function, output_dir)
    assert not (output_dir / LOCK_FILE).exists()
    started = time.monotonic()
    with lock_output_dir(output_dir, world):
        pass
    assert time.monotonic() - started < run_lock._CHANGES_WITHIN_S


def test_a_kill_during_a_write_in_place_is_found(output_dir):
    """The check above can fail."""
    kill_in("fsync", output_dir, "in place")
    assert (output_dir / LOCK_FILE).read_bytes() == b""


def test_without_file_locks_an_owner_that_lost_the_folder_leaves_the_new_file(
    output_dir, world, without_locks
):
    with lock_output_dir(output_dir, world):
        others = write_owner(output_dir, host="elsewhere")
    assert (output_dir / LOCK_FILE).read_bytes() == others


def test_without_file_locks_of_two_that_find_an_ended_process_one_takes_over(
    output_dir, world, without_locks, requeued, monkeypatch
):
    write_owner(output_dir, **HAS_ENDED)
    other = b""
    may_be_alive = run_lock.may_be_alive

    def take_over_meanwhile(*args: object) -> bool:
        nonlocal other
        answer = may_be_alive(*args)
        other = other or write_owner(output_dir)
        return answer

    monkeypatch.setattr(run_lock, "may_be_alive", take_over_meanwhile)
    with (
        pytest.raises(ConfigError, match=f"process {os.getpid()} on {socket.gethostname()}"),
        lock_output_dir(output_dir, world),
    ):
        pass
    assert (output_dir / LOCK_FILE).read_bytes() == other


STARTERS = """
import errno, fcntl, sys, time
from pathlib import Path
from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.world import start_world
from switchtitan.errors import ConfigError
from switchtitan.training.run_lock import lock_output_dir

def refuse(*args):
    raise OSError(errno.ENOLCK, "No locks available")

if sys.argv[1] == "without":
    fcntl.lockf = refuse
world = start_world(ParallelismConfig())
print("ready", flush=True)
for line in sys.stdin:
    start_at, folder = line.split()
    while time.time() < float(start_at):
        pass
    try:
        with lock_output_dir(Path(folder), world):
            print("owns", flush=True)
            sys.stdin.readline()
    except ConfigError as error:
        assert "trains in this folder" in str(error), error
        print("refused", flush=True)
        sys.stdin.readline()
    print("ended", flush=True)
"""


@pytest.mark.parametrize("locks", ["with", "without"])
@pytest.mark.parametrize("is_left", [False, True], ids=["new folder", "file of an ended process"])
def test_of_two_that_start_at_the_same_instant_one_owns_the_folder(tmp_path, locks, is_left):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", STARTERS, locks],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]

    def answers(lines: Callable[[], str]) -> list[str]:
        for process in processes:
            process.stdin.write(lines())
            process.stdin.flush()
        return sorted(process.stdout.readline() for process in processes)

    assert answers(lambda: "") == ["ready\n"] * 2
    for number in range(20):
        folder = tmp_path / f"run-{number}"
        if is_left:
            write_owner(folder, start_ticks=1)
        start_at = time.time() + 0.02
        assert answers(lambda at=start_at, to=folder: f"{at} {to}\n") == ["owns\n", "refused\n"]
        assert answers(lambda: "\n") == ["ended\n"] * 2
        assert not folder.exists() or not list(folder.iterdir())
    for process in processes:
        process.stdin.close()
        assert process.wait(60) == 0

"""The process that a lock file names, and whether it may still run."""

import os
import socket
import time
from pathlib import Path

from pydantic import BaseModel, PositiveInt, ValidationError


class Owner(BaseModel):
    """The contents of a lock file. Without /proc, and in files of older versions, some are None."""

    host: str
    pid: PositiveInt
    since: str
    """Local time of the lock."""
    has_kernel_lock: bool = True
    """False on a file system without locks, where the file alone counts."""
    pid_namespace: str | None = None
    """A process ID has no meaning in another one, such as another container's."""
    boot_id: str | None = None
    start_ticks: int | None = None
    """Start of the process in clock ticks after the boot. Process IDs are reused."""
    slurm_job: str | None = None
    slurm_restarts: int = 0
    """How often Slurm has requeued the job."""


def this_process(*, has_kernel_lock: bool) -> Owner:
    """Returns what a lock file says about this process."""
    stat, restarts = _stat(os.getpid()), os.environ.get("SLURM_RESTART_COUNT", "")
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        since=time.strftime("%F %T %z"),
        has_kernel_lock=has_kernel_lock,
        pid_namespace=_pid_namespace(),
        boot_id=_boot_id(),
        start_ticks=None if stat is None else stat[1],
        slurm_job=os.environ.get("SLURM_JOB_ID") or None,
        slurm_restarts=int(restarts) if restarts.isdecimal() else 0,
    )


def parse_owner(contents: bytes) -> Owner | None:
    """Returns the owner; None for a file that is not completely written, or is another kind."""
    try:
        return Owner.model_validate_json(contents)
    except ValidationError:
        return None


def may_be_alive(owner: Owner, own: Owner) -> bool:
    """Whether `owner` may still run, as seen from this process, `own`.

    Its process is looked up only if it is of this host, this boot and this namespace of process
    IDs. Another boot may be that of another machine with the same host name, as containers and
    clones have. Of all others, only a process that Slurm has requeued has ended.
    """
    if is_here(owner, own) and not _differ(owner.pid_namespace, own.pid_namespace):
        return _is_running(owner)
    # It may only have lost its connection. Slurm ends all processes of a job before it requeues
    # it. A name that torchrun's users choose (RDZV_ID) says nothing: two runs may share it.
    is_of_job = own.slurm_job is not None and own.slurm_job == owner.slurm_job
    return not (is_of_job and own.slurm_restarts > owner.slurm_restarts)


def is_here(owner: Owner, own: Owner) -> bool:
    """Whether `owner` has the host name of this process, `own`, and was not of another boot.

    Without /proc, the name alone counts.
    """
    return owner.host == own.host and not _differ(owner.boot_id, own.boot_id)


def _is_running(owner: Owner) -> bool:
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's
    stat = _stat(owner.pid)
    if stat is None:
        return True
    state, start_ticks = stat
    has_ended = state in ("Z", "X")  # its parent has not noticed, as in containers without init
    return not has_ended and not _differ(owner.start_ticks, start_ticks)


def _differ(first: object, second: object) -> bool:
    """Whether both are known and different."""
    return first is not None and second is not None and first != second


def _stat(pid: int) -> tuple[str, int] | None:
    """Returns a process's state and `start_ticks` (fields 3 and 22 of proc(5)), if visible."""
    try:
        contents = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The second field is the name in parentheses, which may itself contain both.
    fields = contents.rpartition(b")")[2].split()
    return fields[0].decode(), int(fields[19])


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _pid_namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None

"""Checks, before any rank starts, that this process can join the others of its run."""

import errno
import os
import re
import socket

from switchtitan.errors import EnvironmentMismatchError

_EXPECTED = "expected HOST:PORT, the same on every machine, with HOST one of them"


def check_slurm_tasks(num_nodes: int) -> None:
    """Checks that Slurm has not started this command more often than once per machine.

    Call where no launcher says how the tasks train together. Each would train alone, and all would
    write to the same output folder.

    Args:
        num_nodes: number of machines of the run.

    Raises:
        EnvironmentMismatchError: if srun has started more tasks.
    """
    # srun sets both in its tasks. A batch script has only the first. A shell in an allocation may
    # have the first of the allocation, and 1 as the second.
    counts = [os.environ.get(name, "") for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")]
    num_tasks = min((int(count) if count.isdecimal() else 1) for count in counts)
    if num_tasks <= num_nodes:
        return
    raise EnvironmentMismatchError(
        f"SLURM_NTASKS={num_tasks}, NNODES={num_nodes}: srun has started {num_tasks} tasks, and "
        "they would train apart from each other in the same output folder; start one task per "
        "machine with NNODES and RDZV_ENDPOINT, as scripts/slurm/train.sbatch does, or set RANK, "
        "WORLD_SIZE and the other variables of docs/MULTINODE.md in every task; for separate runs, "
        "unset SLURM_NTASKS in every task"
    )


def check_rendezvous(
    endpoint: str, num_nodes: int, node_rank: int | None, source: str | None = None
) -> None:
    """Checks the address of the rendezvous and this machine's index.

    Args:
        endpoint: HOST:PORT; the port of a single machine may be 0.
        num_nodes: number of machines.
        node_rank: index of this machine; None if the rendezvous assigns it.
        source: what the user set, for error messages; by default `RDZV_ENDPOINT`.

    Raises:
        EnvironmentMismatchError: if the rendezvous cannot work.
    """
    if node_rank is not None and not 0 <= node_rank < num_nodes:
        raise EnvironmentMismatchError(
            f"NODE_RANK={node_rank}: expected an index below NNODES={num_nodes}; machines are "
            "counted from 0"
        )
    if num_nodes == 1:
        return
    source = source or f"RDZV_ENDPOINT={endpoint}"
    host, port = split_endpoint(endpoint)
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise EnvironmentMismatchError(
            f"{source}: the host name {host} cannot be resolved on this machine "
            f"({error.strerror or error}); use a name that all machines know, or an IP address"
        ) from error
    if node_rank == 0 and not _is_free(port):
        raise EnvironmentMismatchError(
            f"{source}: port {port} of this machine, which NODE_RANK=0 makes the "
            "host, is in use; choose another"
        )


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Returns host and port of HOST:PORT; an IPv6 address is in brackets.

    Raises:
        EnvironmentMismatchError: if it has another form.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\s:\[\]/]+)):([0-9]{1,5})", endpoint)
    port = int(match[3]) if match else 0
    if match is None or not 0 < port < 1 << 16:
        given = f"RDZV_ENDPOINT={endpoint}" if endpoint else "RDZV_ENDPOINT is not set"
        raise EnvironmentMismatchError(f"{given}: {_EXPECTED}")
    return match[1] or match[2], port


def _is_free(port: int) -> bool:
    """Whether this machine can listen on `port`."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True

"""Checks that this process can join the others of its run. `train` needs no more of `launch`."""

import os
import socket

from switchtitan.errors import EnvironmentMismatchError


def check_slurm_tasks(num_nodes: int) -> None:
    """Checks that srun has not started this command more often than once per machine.

    Call where no launcher says how the tasks train together.

    Raises:
        EnvironmentMismatchError: if it has; each task would train alone.
    """
    # srun sets both in its tasks. A batch script has only the first. A shell in an allocation may
    # have the first of the allocation, and 1 as the second.
    counts = [os.environ.get(name, "") for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")]
    num_tasks = min((int(count) if count.isdecimal() else 1) for count in counts)
    if num_tasks > num_nodes:
        raise EnvironmentMismatchError(
            f"SLURM_NTASKS={num_tasks}, NNODES={num_nodes}: srun has started {num_tasks} tasks, "
            "and they would train apart from each other in the same output folder; start one task "
            "per machine with NNODES and RDZV_ENDPOINT, as scripts/slurm/train.sbatch does, or set "
            "RANK, WORLD_SIZE and the other variables of docs/CLUSTERS.md in every task; for "
            "separate runs, unset SLURM_NTASKS in every task"
        )


def check_rendezvous(endpoint: str, num_nodes: int) -> None:
    """Checks what would let machines wait for each other in vain.

    Args:
        endpoint: HOST:PORT; not checked for a single machine.

    Raises:
        EnvironmentMismatchError: if the machines cannot meet.
    """
    if num_nodes == 1:
        return
    host, _, port = endpoint.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")  # an IPv6 address
    problem = "expected HOST:PORT"
    if host and port.isdecimal() and 0 < int(port) < 1 << 16:
        try:
            socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
            return
        except OSError as error:
            problem = f"{host} cannot be resolved on this machine ({error.strerror or error})"
    raise EnvironmentMismatchError(
        f"RDZV_ENDPOINT={endpoint}: {problem}; give one of the machines, by a name that all know "
        "or an IP address, and the same HOST:PORT on every machine"
    )

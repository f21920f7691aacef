"""The number of files that a rank may open: each connection to another rank is one."""

import resource

from switchtitan.errors import EnvironmentMismatchError

_NUM_GLOO_GROUPS = {"cpu": 3, "cuda": 2}
"""Groups with a connection to every other rank: the default group on CPUs, the main thread's and
the checkpoint thread's."""
_NUM_OTHER_FILES = 100
"""Libraries, corpus and log files, pipes to other processes; tests count about 40."""


def raise_file_limit(num_ranks: int, device: str) -> None:
    """Raises this process's limit of open files to what connections to all ranks need.

    Args:
        device: "cpu" or "cuda".

    Raises:
        EnvironmentMismatchError: if the largest allowed is too low for `num_ranks` ranks.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = num_open_files(num_ranks, device)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise EnvironmentMismatchError(
            f"{num_ranks} ranks need {needed} open files per process, and the limit is {hard} "
            "(ulimit -Hn); increase it on every machine, for example LimitNOFILE of the batch "
            "system's service, or nofile in /etc/security/limits.conf"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def num_open_files(num_ranks: int, device: str) -> int:
    """Returns an upper bound of the files that a rank opens."""
    return _NUM_OTHER_FILES + _NUM_GLOO_GROUPS[device] * (num_ranks - 1)

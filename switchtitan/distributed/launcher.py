"""The variables in which a launcher, such as torchrun, tells a process its rank.

An empty variable counts as unset, as in `./run_train.sh`.
"""

import os

from switchtitan.errors import EnvironmentMismatchError


def is_launched() -> bool:
    """Whether a launcher has started this process as one of its ranks."""
    return bool(os.environ.get("WORLD_SIZE"))


def num_ranks_from_launcher() -> int:
    """Returns the number of ranks that the launcher started; 1 without a launcher.

    Raises:
        EnvironmentMismatchError: if `WORLD_SIZE` is not a number of ranks.
    """
    return _number("WORLD_SIZE", default=1, at_least=1)


def rank_from_launcher() -> int:
    """Returns this process's rank; 0 without a launcher.

    Raises:
        EnvironmentMismatchError: if `RANK` is not a rank below `WORLD_SIZE`.
    """
    rank, num_ranks = _number("RANK", default=0), num_ranks_from_launcher()
    if rank >= num_ranks:
        of_ranks = f"WORLD_SIZE={num_ranks}" if is_launched() else "WORLD_SIZE, which is not set"
        raise EnvironmentMismatchError(
            f"RANK={rank}: expected a rank below {of_ranks}; a launcher must set both for every "
            "rank, ./run_train.sh does; without a launcher, unset RANK"
        )
    return rank


def local_rank_from_launcher() -> int:
    """Returns this process's index among the ranks of this machine; 0 without a launcher.

    Raises:
        EnvironmentMismatchError: if `LOCAL_RANK` is not a number.
    """
    return _number("LOCAL_RANK", default=0)


def num_local_ranks_from_launcher() -> int:
    """Returns the number of ranks on this machine, by default all.

    Raises:
        EnvironmentMismatchError: if `LOCAL_WORLD_SIZE` is not a number of ranks.
    """
    return _number("LOCAL_WORLD_SIZE", default=num_ranks_from_launcher(), at_least=1)


def _number(name: str, default: int, at_least: int = 0) -> int:
    given = os.environ.get(name)
    if not given:
        return default
    if not (given.isascii() and given.isdecimal()) or int(given) < at_least:
        raise EnvironmentMismatchError(
            f"{name}={given}: expected an integer >= {at_least}; a launcher sets it for every "
            "rank, ./run_train.sh does; without a launcher, unset it"
        )
    return int(given)

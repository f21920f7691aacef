"""The variables in which a launcher, such as torchrun, tells a process its rank."""

import os


def num_ranks_from_launcher() -> int:
    """Returns the number of ranks that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))

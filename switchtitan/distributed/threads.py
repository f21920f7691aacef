"""Threads of this process: which of them may run CPU operations in parallel."""

import threading

import torch


def limit_other_threads() -> None:
    """Makes CPU operations serial in every thread that starts after this call.

    The calling thread keeps its number of threads. Call it again after `torch.set_num_threads`.

    OpenMP gives each thread that runs a parallel operation a team of its own, which lives as long
    as that thread. Threads of gloo's groups run one for each object of more than 32 KiB, such as a
    checkpoint's plan, and live until the end. With more team members than cores, GNU's OpenMP makes
    all barriers sleep instead of spin (GOMP_SPINCOUNT in its manual), so every later operation of
    the calling thread would take longer.
    """
    # The calling thread reads its number now, before the default for others changes.
    torch.get_num_threads()
    # Changes the default for all threads, and OpenMP's number for the calling one alone.
    other = threading.Thread(target=torch.set_num_threads, args=(1,), name="limit-threads")
    other.start()
    other.join()

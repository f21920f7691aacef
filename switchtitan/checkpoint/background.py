"""Threads that write checkpoints while the run trains."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def write_in_background(function: Callable[[], Result]) -> Future[Result]:
    """Calls `function` in a thread. The interpreter waits for it at its exit."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    future = thread.submit(function)
    thread.shutdown(wait=False)
    return future

"""Threads that write checkpoints while the run trains."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

_THREAD_NAME = "checkpoint-writer"


def write_in_background(function: Callable[[], Result]) -> Future[Result]:
    """Calls `function` in a thread. The interpreter waits for it at its exit."""
    thread = ThreadPoolExecutor(1, thread_name_prefix=_THREAD_NAME)
    future = thread.submit(function)
    thread.shutdown(wait=False)
    return future


def join_writers(timeout_s: float) -> bool:
    """Waits for all background saves of this process; returns whether they have ended."""
    deadline = time.monotonic() + timeout_s
    writers = [thread for thread in threading.enumerate() if thread.name.startswith(_THREAD_NAME)]
    for writer in writers:
        writer.join(max(0.0, deadline - time.monotonic()))
    return not any(writer.is_alive() for writer in writers)

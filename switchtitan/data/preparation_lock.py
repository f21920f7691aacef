"""One process at a time prepares a corpus."""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def preparation_lock(file: Path) -> Iterator[None]:
    """Holds an exclusive lock on `file`, waiting for whoever holds it now.

    The lock belongs to the open file, so the system frees it when its holder dies; the file itself stays.
    """
    with file.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that prepares this corpus (lock %s)", file)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield

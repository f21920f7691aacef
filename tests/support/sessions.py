"""Commands in the background, each in a session that ends with the block that uses it."""

import os
import re
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path


class Started:
    """A command that runs, and the file with its standard output and error."""

    def __init__(self, process, output):
        self.process = process
        self.output = output

    @property
    def said(self):
        return self.output.read_text()

    def children(self, word=b""):
        """The processes that the command itself has started, with this in their command line."""
        threads = Path(f"/proc/{self.process.pid}/task").iterdir()
        pids = [pid for thread in threads for pid in (thread / "children").read_text().split()]
        return [int(pid) for pid in pids if word in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def wait_until(self, is_reached):
        """Waits for a condition, at most three minutes and while the command runs."""
        deadline = time.monotonic() + 180
        while not is_reached():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def wait_for(self, text):
        """Waits until the command has printed what matches the expression."""
        self.wait_until(lambda: re.search(text, self.said))


@contextmanager
def started(command, output, **options):
    """Starts a command; at the end of the block, stops it and kills what is left of its group."""
    with output.open("w") as printed:
        process = subprocess.Popen(
            command,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # In the background, a shell starts programs that ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            **options,
        )
    try:
        yield Started(process, output)
    finally:
        if process.poll() is None:
            # As Ctrl-C: a comparison stops its trainings, which have sessions of their own.
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
        with suppress(ProcessLookupError):  # processes that hang outlive the one that started them
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

"""Log handlers for the console, above a progress bar, and for a file."""

import logging
import sys
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from switchtitan.errors import discard_output


def configure_logging(*, is_main: bool, rank: int = 0, log_file: Path | None = None) -> None:
    """Sends this package's records and other packages' warnings to standard output.

    Calling it again replaces the earlier handlers.

    Args:
        is_main: print records from INFO up; other ranks print warnings only, with their rank.
        log_file: the main rank also appends all records with timestamps to this file, and creates
            its folder.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, _ConsoleHandler | _LogFileHandler):
            root.removeHandler(handler)
            handler.close()
    root.addHandler(_ConsoleHandler("" if is_main else f"[rank {rank}] "))
    if is_main and log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        root.addHandler(_LogFileHandler(log_file))
    root.setLevel(logging.WARNING)
    logging.getLogger("switchtitan").setLevel(logging.INFO if is_main else logging.WARNING)


class _ConsoleHandler(logging.Handler):
    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        try:
            severity = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            # Redraws a progress bar below the line.
            tqdm.write(f"{self._prefix}{severity}{self.format(record)}", file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            discard_output()
            message = "warning: standard output was closed; the log continues in the log file only"
            print(message, file=sys.stderr)
        except Exception:
            # As logging's own handlers: a failed record must not end the program.
            self.handleError(record)


class _LogFileHandler(logging.FileHandler):
    """Says once that lines cannot be written; logging's own handlers print a traceback for each."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not self._has_failed:
            self._has_failed = True
            message = f"could not write to {self.baseFilename} ({sys.exc_info()[1]})"
            tqdm.write(f"warning: {message}; lines may be missing", file=sys.stdout)

    def close(self) -> None:
        with suppress(OSError):  # what is still buffered
            super().close()

"""Where log records go: the console, undisturbed by a progress bar, and a file."""

import logging
import sys
from pathlib import Path

from tqdm import tqdm

PACKAGE = "switchtitan"

_FILE_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def configure_logging(*, is_main: bool, rank: int = 0, log_file: Path | None = None) -> None:
    """Sends this package's records to the standard output and other packages' warnings with them.

    Calling it again replaces what it set up before.

    Args:
        is_main: whether to print records from INFO on; other ranks print warnings only, with their rank.
        log_file: on the main rank, also append all records with their time to this file; its folder is made.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _OWN_HANDLERS)]:
        root.removeHandler(handler)
        handler.close()
    root.addHandler(_ConsoleHandler("" if is_main else f"[rank {rank}] "))
    if is_main and log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        root.addHandler(_LogFileHandler(log_file))
    root.setLevel(logging.WARNING)
    logging.getLogger(PACKAGE).setLevel(logging.INFO if is_main else logging.WARNING)


class _ConsoleHandler(logging.Handler):
    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        try:
            severity = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            # Clears a progress bar, if there is one, and draws it again below the line.
            tqdm.write(f"{self._prefix}{severity}{self.format(record)}", file=sys.stdout)
            sys.stdout.flush()
        except (
            Exception
        ):  # logging's own rule: a record that cannot be written must not end the program
            self.handleError(record)


class _LogFileHandler(logging.FileHandler):
    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self.setFormatter(logging.Formatter(_FILE_FORMAT))


_OWN_HANDLERS = (_ConsoleHandler, _LogFileHandler)

"""The line of the project that is running."""

import sys
from pathlib import Path

import switchtitan

_PROJECT = str(Path(switchtitan.__file__).parent)
_COUNTERS = "count_collectives.py"


def project_line() -> str:
    """The innermost line of `switchtitan` outside of counters; "torch" if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PROJECT) and not name.endswith(_COUNTERS):
            return f"{name[len(_PROJECT) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "torch"

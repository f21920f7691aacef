"""`switchtitan compare` as a process, on runs of 30 steps."""

import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from support.sessions import Started, started
from support.tiny import TINY


def write_base(folder: Path) -> None:
    """Writes `base.toml`, the training configuration of all rows."""
    base = TINY.format(folder=folder / "runs", method="full_rank", method_keys="")
    changes = {
        "steps = 40": "steps = 30",
        "[checkpoint]\ninterval = 20": "[checkpoint]\ninterval = 5",
        "[evaluation]\ninterval = 20": "[evaluation]\ninterval = 5\ntest_tokens = 160",
        "num_workers = 0": "num_workers = 0\ntest_fraction = 0.1",
        "tensorboard = false": "tensorboard = true",
    }
    for given, changed in changes.items():
        assert base.count(given) == 1, given
        base = base.replace(given, changed)
    (folder / "base.toml").write_text(base)


def compare(file: Path, *arguments: str | Path) -> AbstractContextManager[Started]:
    """Starts a comparison in its folder."""
    command = [sys.executable, "-m", "switchtitan", "compare", str(file)]
    return started(
        [*command, *map(str, arguments)],
        file.parent / "output.txt",
        cwd=file.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finished(folder: Path) -> list[Path]:
    return sorted((folder / "out" / "runs").glob("*/*/results.json"))

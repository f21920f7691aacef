"""The environment in which tests call the scripts."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables that make the scripts use this interpreter as a complete environment."""
    folder = tmp_path_factory.mktemp("environment")
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    with (REPOSITORY / "pyproject.toml").open("rb") as project:
        done = subprocess.run(["cksum"], stdin=project, capture_output=True, text=True, check=True)
    (folder / ".switchtitan-installed-plain").write_text(f"{done.stdout.strip()} {REPOSITORY}\n")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**inherited, "VIRTUAL_ENV": str(folder), "OMP_NUM_THREADS": "1", "NGPU": "1"}

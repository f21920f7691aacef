"""Tests see no GPU, except those marked `gpu` in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(("expression", "expected"), [("not slow", ""), ("gpu", "0,1")])
def test_gpus_are_hidden_from_other_tests(tmp_path: Path, expression: str, expected: str) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n    slow\n")
    (tmp_path / "test_visible.py").write_text(
        "import os\n\nimport pytest\n\n"
        # Not in the tests: without a GPU, those marked `gpu` are skipped.
        f"assert os.environ['CUDA_VISIBLE_DEVICES'] == {expected!r}\n\n\n"
        "def test_visible():\n    pass\n\n\n@pytest.mark.gpu\ndef test_gpu():\n    pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-m", expression]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(TESTS), "CUDA_VISIBLE_DEVICES": "0,1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout

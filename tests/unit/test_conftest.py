"""Tests see no GPU, except those marked `gpu` in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    is_tested = expression != "gpu" or torch.cuda.is_available()
    assert done.returncode == (0 if is_tested else 1), done.stdout
    assert ("error: all GPU tests were skipped" in done.stdout) == (not is_tested)


@pytest.mark.slow
@pytest.mark.parametrize(("is_run", "status"), [(True, 0), (False, 1)])
def test_gpu_tests_fail_if_all_are_skipped(tmp_path: Path, is_run: bool, status: int) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n")
    (tmp_path / "test_gpus.py").write_text(
        "import pytest\nimport torch\n\n"
        "torch.cuda.is_available = lambda: True\n\n\n"
        "@pytest.mark.gpu\ndef test_skipped():\n    pytest.skip('needs two GPUs')\n\n\n"
        f"@pytest.mark.gpu\ndef test_run():\n    {is_run} or pytest.skip('needs four')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-m", "gpu"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, done.stdout
    assert ("error: all GPU tests were skipped" in done.stdout) == (status == 1)

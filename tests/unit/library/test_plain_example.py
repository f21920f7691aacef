"""The first example of docs/LIBRARY.md, and the packages that it needs."""

import re
import subprocess
import sys

import pytest
from support.loops import missing_packages, run_example


def test_the_plain_example_runs_without_the_trainer_s_packages(tmp_path):
    assert {"datasets", "tensorboard", "matplotlib"} <= set(missing_packages())
    printed = run_example("A plain loop", tmp_path)
    steps = re.findall(r"^(\d+) (\d\.\d{4}) \d+\.0$", printed, re.MULTILINE)
    assert [step for step, _ in steps] == ["20", "40", "60", "80", "100"]
    assert float(steps[-1][1]) < float(steps[0][1])
    assert (tmp_path / "outputs" / "switchlora_plain" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("code", "status", "printed"),
    [
        ("from switchtitan import apply; print('torch' in sys.modules)", 0, "False"),
        ("from switchtitan.cli.main import run; run(['train'])", 2, "pip install '.[train]'"),
    ],
)
def test_what_is_not_needed_is_not_imported_and_what_is_missing_is_named(code, status, printed):
    block = f"import sys; sys.modules.update(dict.fromkeys({missing_packages()})); "
    done = subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True)
    assert (done.returncode, printed in done.stdout + done.stderr) == (status, True), done

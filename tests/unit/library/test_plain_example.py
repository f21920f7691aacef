"""The first example of docs/LIBRARY.md, and the packages that it needs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomli
from support.loops import run_example


def blocked_packages():
    """The packages of the extra `train` that transformers does not install."""
    project = tomli.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    packages = {
        re.match(r"[\w-]+", line)[0].replace("-", "_")
        for line in project["optional-dependencies"]["train"]
    }
    return sorted(packages - {"tokenizers", "huggingface_hub", "filelock"})


def test_the_plain_example_runs_without_the_trainer_s_packages(tmp_path):
    assert {"datasets", "tensorboard", "matplotlib"} <= set(blocked_packages())
    block = f"import sys\n\nsys.modules.update(dict.fromkeys({blocked_packages()}))\nimport torch\n"
    printed = run_example("A plain loop", tmp_path, [("import torch\n", block)])
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
    block = f"import sys; sys.modules.update(dict.fromkeys({blocked_packages()})); "
    done = subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True)
    assert (done.returncode, printed in done.stdout + done.stderr) == (status, True), done

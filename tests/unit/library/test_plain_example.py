"""The first example of docs/LIBRARY.md, and the packages that it needs."""

import re
import subprocess
import sys
from pathlib import Path

import tomli
from support.loops import run_example

OF_TRANSFORMERS = {"tokenizers", "huggingface_hub", "filelock"}


def test_the_plain_example_runs_without_the_trainer_s_packages(tmp_path):
    project = tomli.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    train = project["optional-dependencies"]["train"]
    packages = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in train}
    missing = sorted(packages - OF_TRANSFORMERS)
    assert {"datasets", "tensorboard", "matplotlib"} <= set(missing)
    block = f"import sys\n\nsys.modules.update(dict.fromkeys({missing}))\nimport torch\n"
    printed = run_example("A plain loop", tmp_path, [("import torch\n", block)])
    steps = re.findall(r"^(\d+) (\d\.\d{4}) (\d+\.0)$", printed, re.MULTILINE)
    assert [step for step, *_ in steps] == ["20", "40", "60", "80", "100"]
    assert float(steps[-1][1]) < float(steps[0][1])
    assert (tmp_path / "outputs" / "switchlora_plain" / "model.safetensors").exists()


def test_importing_the_door_loads_nothing_else():
    code = "import sys; from switchtitan import apply; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"

"""docs/EXTENDING.md: what it shows is added to a copy of the package as shown, and trains."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny import tiny_toml

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "EXTENDING.md"
CODE = re.compile(
    r"^```python\n# (in )?(switchtitan/\S+\.py)\n(.*?)^```$", re.DOTALL | re.MULTILINE
)
TABLE = re.compile(r"^[A-Z]+\b[^{]*\{", re.MULTILINE)
TOML = re.compile(r"^```toml\n(.*?)^```$", re.DOTALL | re.MULTILINE)

REST = """
max_bytes = 40000
vocab_size = 270
tokenizer = "train"
seq_len = 16
num_workers = 0
"""
"""The keys of `[data]` that the page leaves out; a base file gives those of other sections."""


def add_to(file, shown):
    """Puts the import lines among the file's imports, and a row first into its table, or functions
    before it."""
    lines = shown.strip("\n").splitlines()
    imports = [line for line in lines if line.startswith(("from ", "import "))]
    code = "\n".join(line for line in lines if line not in imports).strip("\n")
    text = file.read_text()
    text = text.replace("\nfrom ", "\n" + "\n".join(imports) + "\nfrom ", 1)
    table = TABLE.search(text)
    place = table.start() if code.startswith("def ") else table.end()
    file.write_text(text[:place] + code + "\n\n\n" * code.startswith("def ") + text[place:])


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the package with all that the guide adds, and a configuration that uses it."""
    folder = tmp_path_factory.mktemp("extending")
    shutil.copytree(
        ROOT / "switchtitan", folder / "switchtitan", ignore=shutil.ignore_patterns("__pycache__")
    )
    page = PAGE.read_text()
    shown = CODE.findall(page)
    assert len(shown) == page.count("```python")
    for is_there, name, code in shown:
        file = folder / name
        if is_there:
            add_to(file, code)
        else:
            assert not file.exists()
            file.write_text(code)
    texts = folder / "texts"
    texts.mkdir()
    rows = [
        f'{n},"document {n} says, again and again, that {n % 7} is a number"' for n in range(600)
    ]
    (texts / "a.csv").write_text("id,body\n" + "\n".join(rows) + "\n")
    data, others = (
        "".join(toml for toml in TOML.findall(page) if ("[data]" in toml) == is_data)
        for is_data in (True, False)
    )
    (folder / "tiny.toml").write_text(tiny_toml(folder, "full_rank"))
    (folder / "run.toml").write_text('base = "tiny.toml"\n' + others + data + REST)
    return folder


def train(folder, num_steps):
    """Returns what the command prints, and the step of its results."""
    words = ("train", "--config", "run.toml", "--training.steps", str(num_steps))
    done = subprocess.run(
        [sys.executable, "-m", "switchtitan", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "run" / "results.json").read_text())["step"]


def test_a_run_with_everything_shown_trains_and_resumes(extended):
    assert train(extended, 8)[1] == 8
    printed, step = train(extended, 12)
    assert "step-000000008" in printed
    assert step == 12

"""A small run of the current checkpoint format, in tests/data/stored_run.tar.xz.

Later versions of the package must resume it. When FORMAT_VERSION changes, store a new one:

    python tests/support/stored_run.py

The archive has the run's checkpoint, configuration, text and prepared corpus, with the times of
their last change, and `expected.json`, what `measure` returned.
"""

import json
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

PROJECT = Path(__file__).parents[2]
ARCHIVE = PROJECT / "tests/data/stored_run.tar.xz"
STEP, NUM_STEPS = 5, 10
CHECKPOINT = Path(f"run/checkpoints/step-{STEP:09d}")
CHANGES = {
    "./../corpora": "corpora",
    "./run": "run",
    'dataset = "pystdlib"': 'dataset = "jsonl"\npath = "texts"',
    "vocab_size = 270": "vocab_size = 257",
    "vocab_size = 271": "vocab_size = 257\ntied_head = true",
    "hidden_size = 20": "hidden_size = 4",
    "intermediate_size = 28": "intermediate_size = 7",
    "rank = 6\ninterval = 5": "rank = 2\ninterval = 4",
    "num_layers = 2": "num_layers = 1",
    "num_kv_heads = 1": "num_kv_heads = 2",
    "interval = 20\nasync": "interval = 5\nasync",
}
"""Of the file of a tiny run."""


def main():
    sys.path[:1] = [str(PROJECT), str(PROJECT / "tests")]  # instead of this file's folder
    from support.tiny import tiny_toml
    from support.tiny_documents import make_documents, write_json_lines

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_json_lines(Path("texts/a.jsonl"), make_documents(30))
        os.utime("texts/a.jsonl", (1e9, 1e9))
        Path("run.toml").write_text(tiny_toml(".", "switchlora", CHANGES))
        train(STEP)
        shutil.copytree("run/checkpoints", "stored")
        Path("expected.json").write_text(json.dumps(measure()))
        shutil.rmtree("run")
        Path("run").mkdir()
        Path("stored").rename("run/checkpoints")
        with tarfile.open(ARCHIVE, "w:xz") as archive:
            for name in ("texts", "corpora", "run.toml", "run/checkpoints", "expected.json"):
                archive.add(name)


def train(num_steps):
    """Gives the run's command in its folder; returns what it prints."""
    from support.commands import succeed

    outcome = succeed("train", "--config", "run.toml", "--training.steps", num_steps)
    return outcome.output + outcome.errors


def measure():
    """Evaluates the stored checkpoint, and resumes the run; returns losses, and the number of
    switched vectors."""
    from support.checkpoints import read_all_tensors
    from support.commands import result_of

    last = CHECKPOINT.with_name(f"step-{NUM_STEPS:09d}")
    before = result_of("evaluate", CHECKPOINT)["loss"]
    assert f"resuming from {CHECKPOINT}" in train(NUM_STEPS)
    switched = read_all_tensors(last)["optimizer.switch.num_switched"].sum().item()
    return {"losses": [before, result_of("evaluate", last)["loss"]], "switched": switched}


if __name__ == "__main__":
    main()
